"""Generation: text and speech from a trained model."""

from megatron_most.inference.generator import Generator
from megatron_most.inference.sampling import Sampling

__all__ = ["Generator", "Sampling"]
