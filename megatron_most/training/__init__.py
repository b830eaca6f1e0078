"""Training: loss, step, optimizer, loop, metrics."""

from megatron_most.training.step_hooks import StepHook
from megatron_most.training.train_step import StepResult, TrainState, build_train_state, train_step
from megatron_most.training.trainer import Trainer

__all__ = ["StepHook", "StepResult", "TrainState", "Trainer", "build_train_state", "train_step"]
