"""Typed configuration: dataclasses with their rules, and how YAML and overrides become one."""

from megatron_most.config.load import CONFIG, dump_config, load_config, read_yaml
from megatron_most.config.model import (
    AttentionConfig,
    CommonExpertsConfig,
    ExpertGroupConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    number_experts,
)
from megatron_most.config.precision import PrecisionConfig
from megatron_most.config.renamed import with_new_names, with_old_names
from megatron_most.config.run import (
    CheckpointConfig,
    DataConfig,
    DatasetConfig,
    LoggingConfig,
    LrScaleConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)

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
