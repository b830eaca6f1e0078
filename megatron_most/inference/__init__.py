"""Generation: text and speech from a trained model."""

from megatron_most.inference.answers import FORMS, Answer, answer, stream
from megatron_most.inference.conversation import Conversation
from megatron_most.inference.generator import Generator
from megatron_most.inference.loading import LoadedModel, MissingCodec, load_for_generation
from megatron_most.inference.requests import respond
from megatron_most.inference.sampling import Decoding, Sampling
from megatron_most.inference.speech import speak, transcribe

__all__ = [
    "FORMS",
    "Answer",
    "Conversation",
    "Decoding",
    "Generator",
    "LoadedModel",
    "MissingCodec",
    "Sampling",
    "answer",
    "load_for_generation",
    "respond",
    "speak",
    "stream",
    "transcribe",
]
