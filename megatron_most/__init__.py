"""Megatron-Core pretraining for MoST: a speech-text mixture-of-experts language model."""

__version__ = "0.1.0"
