"""How the model is split over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from megatron_most.config.rules import require, require_positive
from megatron_most.errors import ConfigError
from megatron_most.keys import key

_LONGEST_TIMEOUT = 7 * 24 * 60


@dataclass
class ParallelConfig:
    """How the model is split over ranks. The data-parallel size follows from the number of ranks."""

    tensor_model_parallel_size: int = key(
        1, "tensor-parallel ranks; above 1, sequence parallelism is on", "--tensor-model-parallel-size"
    )
    pipeline_model_parallel_size: int = key(1, "pipeline-parallel ranks", "--pipeline-model-parallel-size")
    virtual_pipeline_model_parallel_size: int | None = key(
        None,
        "virtual pipeline stages per rank (interleaved schedule); null for none",
        "--num-virtual-stages-per-pipeline-rank",
    )
    context_parallel_size: int = key(
        1, "context-parallel ranks, which share the positions of a row", "--context-parallel-size"
    )
    expert_model_parallel_size: int = key(
        1, "expert-parallel ranks, which share the routed experts", "--expert-model-parallel-size"
    )
    expert_tensor_parallel_size: int | None = key(
        None,
        "tensor-parallel ranks of a routed expert; null for `tensor_model_parallel_size`",
        "--expert-tensor-parallel-size",
    )
    distributed_timeout_minutes: float = key(
        10.0,
        "minutes that a rank waits for others, in NCCL and gloo alike, or for its own data, before the run ends with an"
        " error; after half of them it says where every rank is",
        "--distributed-timeout-minutes",
    )

    def __post_init__(self) -> None:
        sizes = (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
        )
        require_positive("parallel", self, sizes)
        require(
            0 < self.distributed_timeout_minutes <= _LONGEST_TIMEOUT,
            "parallel.distributed_timeout_minutes",
            self.distributed_timeout_minutes,
            f"must be greater than 0, and at most {_LONGEST_TIMEOUT} (a week)",
        )
        if self.expert_tensor_parallel_size is not None:
            require_positive("parallel", self, ("expert_tensor_parallel_size",))
        if self.virtual_pipeline_model_parallel_size is not None:
            require(
                self.virtual_pipeline_model_parallel_size > 1,
                "parallel.virtual_pipeline_model_parallel_size",
                self.virtual_pipeline_model_parallel_size,
                "must be at least 2, or null",
            )
            require(
                self.pipeline_model_parallel_size > 1,
                "parallel.virtual_pipeline_model_parallel_size",
                self.virtual_pipeline_model_parallel_size,
                "needs pipeline_model_parallel_size of at least 2",
            )

    @property
    def sizes(self) -> dict[str, int | None]:
        """What makes two layouts the same: all fields but the timeout."""
        return {name: value for name, value in vars(self).items() if name != "distributed_timeout_minutes"}

    @property
    def timeout(self) -> timedelta:
        """How long a rank waits for others."""
        return timedelta(minutes=self.distributed_timeout_minutes)

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the dense part of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def expert_tensor_size(self) -> int:
        """Expert tensor parallelism; Megatron's default is the tensor parallel size."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def num_stages(self) -> int:
        """Pipeline stages of all ranks, virtual stages included."""
        return self.pipeline_model_parallel_size * (self.virtual_pipeline_model_parallel_size or 1)

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas of the dense part; raises :class:`ConfigError` when the layout does not fit ``world_size`` ranks."""
        dense = self.model_parallel_size
        experts = self.expert_tensor_size * self.expert_model_parallel_size * self.pipeline_model_parallel_size
        for name, size in (("tensor x pipeline x context", dense), ("expert tensor x expert x pipeline", experts)):
            if size > world_size:
                raise ConfigError(f"parallel: {name} = {size} ranks, but only {world_size} were started")
            if world_size % size:
                raise ConfigError(f"parallel: {name} = {size} must divide the world size, {world_size}")
        return world_size // dense
