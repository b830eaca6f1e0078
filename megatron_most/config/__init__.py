"""Typed configuration: dataclasses with their rules, built from YAML and overrides."""

from megatron_most.config.attention import AttentionConfig, RopeConfig
from megatron_most.config.data import DataConfig, DatasetConfig
from megatron_most.config.load import CONFIG, dump_config, load_config, read_yaml
from megatron_most.config.model import ModelConfig
from megatron_most.config.moe import CommonExpertsConfig, ExpertGroupConfig, MoEConfig, number_experts
from megatron_most.config.optimizer import LrScaleConfig, OptimizerConfig
from megatron_most.config.parallel import ParallelConfig
from megatron_most.config.precision import PrecisionConfig
from megatron_most.config.renamed import with_new_names, with_old_names
from megatron_most.config.run import RunConfig
from megatron_most.config.training import CheckpointConfig, LoggingConfig, RetentionConfig, TrainingConfig

__all__ = [
    "CONFIG",
    "AttentionConfig",
    "CheckpointConfig",
    "CommonExpertsConfig",
    "DataConfig",
    "DatasetConfig",
    "ExpertGroupConfig",
    "LoggingConfig",
    "LrScaleConfig",
    "ModelConfig",
    "MoEConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "RetentionConfig",
    "RopeConfig",
    "RunConfig",
    "TrainingConfig",
    "dump_config",
    "load_config",
    "number_experts",
    "read_yaml",
    "with_new_names",
    "with_old_names",
]
