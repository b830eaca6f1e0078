"""Generation: text and speech from a trained model."""

from megatron_most.inference.generator import Generator
from megatron_most.inference.loading import LoadedModel, load_for_generation
from megatron_most.inference.sampling import Sampling
from megatron_most.inference.speech import answer_in_speech, answer_in_text, speak, transcribe

__all__ = [
    "Generator",
    "LoadedModel",
    "Sampling",
    "answer_in_speech",
    "answer_in_text",
    "load_for_generation",
    "speak",
    "transcribe",
]
