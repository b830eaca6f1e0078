"""Training: loss, step, optimizer, loop, metrics."""

from megatron_most.training.trainer import Trainer

__all__ = ["Trainer"]
