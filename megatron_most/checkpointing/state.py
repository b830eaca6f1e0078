"""The sharded tensors of a checkpoint: Megatron's ``torch_dist`` format, readable in any parallel layout.

Only tensors come from the optimizer's state. Hyper-parameters belong to the configuration and the schedule is a
function of the updates made, so that a run may go on with another learning rate or another layout; the one number left,
AdamW's step count, is set by us.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import CheckpointingException, ShardedObject
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed import checkpoint as torch_checkpoint

from megatron_most.checkpointing.optimizer_state import OptimizerState
from megatron_most.checkpointing.rank_save import PlannedSave, RankSave
from megatron_most.errors import CheckpointError, first_line
from megatron_most.model import MoSTModel
from megatron_most.model.fp8 import fp8_state, load_fp8_state
from megatron_most.parallel import fail

StateDict = dict[str, Any]


def plan_state(directory: Path, model_chunks: list[MoSTModel], optimizer: MegatronOptimizer, copy: bool) -> RankSave:
    """What this rank is to write of model, optimizer, FP8 histories and random states. A collective call.

    Args:
        directory: empty; files that do not depend on the size of the model are written at once.
        copy: hold a copy of what will be written, so that training may go on.

    Raises:
        CheckpointError: the storage refused.
    """
    state = _model_state(model_chunks)
    state |= {"optimizer": OptimizerState(optimizer, state, loading=False).tensors, "rng": _rng_state()}
    state["fp8"] = fp8_state(model_chunks)
    planned = PlannedSave(copy)
    try:
        with _without_torch_warnings():
            dist_checkpointing.save(state, str(directory), FullyParallelSaveStrategyWrapper(planned, _replica_group()))
    except (OSError, CheckpointingException) as error:
        raise CheckpointError(f"{directory}: cannot be written: {first_line(error)}") from error
    return planned.rank_save


def load_state(
    directory: Path,
    model_chunks: list[MoSTModel],
    optimizer: MegatronOptimizer,
    num_updates: int,
    same_layout: bool,
    had_frozen_parts: bool,
) -> None:
    """Read what :func:`plan_state` planned, in any layout; random states only in the ``same_layout``. Collective.

    Args:
        optimizer: without a step taken; it goes on after ``num_updates`` updates.
        had_frozen_parts: the checkpoint may lack the optimizer state of weights; where it does, theirs starts anew.
    """
    state = _model_state(model_chunks)
    optimizer_state = OptimizerState(optimizer, state, loading=True)
    if had_frozen_parts:
        optimizer_state.leave_out_all_but(_stored_keys(directory))
    state |= {"optimizer": optimizer_state.tensors, "fp8": fp8_state(model_chunks)}
    if same_layout:
        state["rng"] = _rng_state()
    loaded = _load(directory, state)
    _set_model_state(model_chunks, loaded)
    # The fp32 copies of weights that were frozen; those of others are in the checkpoint.
    optimizer.reload_model_params()
    # A rank without a tensor of its own gets no dictionary back.
    optimizer_state.apply(loaded.get("optimizer", {}), num_updates)
    load_fp8_state(model_chunks, loaded.get("fp8", {}))
    if same_layout:
        _set_rng_state(loaded["rng"])


def load_model_state(directory: Path, model_chunks: list[MoSTModel]) -> None:
    """Read the model's weights alone, in any layout. A collective call."""
    _set_model_state(model_chunks, _load(directory, _model_state(model_chunks)))


def _load(directory: Path, state: StateDict) -> StateDict:
    strategy = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), _replica_group())
    try:
        with _without_torch_warnings():
            return dist_checkpointing.load(state, str(directory), strategy)
    except (OSError, CheckpointingException) as error:
        raise CheckpointError(f"{directory}: cannot be loaded: {first_line(error)}") from error
    except torch_checkpoint.CheckpointException as error:
        _fail_once(f"{directory}: cannot be loaded", error)


def _stored_keys(directory: Path) -> set[str]:
    return set(torch_checkpoint.FileSystemReader(str(directory)).read_metadata().state_dict_metadata)


@contextlib.contextmanager
def _without_torch_warnings() -> Iterator[None]:
    """torch warns of the interfaces that Megatron-Core 0.19.2 uses and how; users can do nothing about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        # serialization.py:230 reads a small object on each rank by itself, with arguments in another order.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        warnings.filterwarnings("ignore", "The argument order of load has been changed", UserWarning)
        yield


def _replica_group() -> dist.ProcessGroup:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _model_state(model_chunks: list[MoSTModel]) -> StateDict:
    """Sharded weights by chunk, without ``_extra_state``, which differs between Transformer Engine and plain layers."""
    options = {"singleton_local_shards": False, "dp_cp_group": _replica_group()}
    names = ["model"] if len(model_chunks) == 1 else [f"model{i}" for i in range(len(model_chunks))]
    return {
        name: {
            key: value
            for key, value in chunk.sharded_state_dict(metadata=options).items()
            if not key.endswith("_extra_state")
        }
        for name, chunk in zip(names, model_chunks, strict=True)
    }


def _set_model_state(model_chunks: list[MoSTModel], loaded: StateDict) -> None:
    for index, chunk in enumerate(model_chunks):
        weights = loaded["model" if len(model_chunks) == 1 else f"model{index}"]
        missing, unexpected = chunk.load_state_dict(weights, strict=False)
        missing = [key for key in missing if not key.endswith("_extra_state")]
        if missing or unexpected:
            raise CheckpointError(f"checkpoint lacks weights {missing} and has unknown ones {unexpected}")


def _rng_state() -> ShardedObject:
    """Random states of this rank; only a run in the same layout can use them."""
    state = {"cpu": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return ShardedObject("rng", state, (dist.get_world_size(),), (dist.get_rank(),))


def _set_rng_state(state: dict[str, Any]) -> None:
    """Go on with random states that were saved, unless on another kind of device, whose generators are others."""
    if ("cuda" in state) != torch.cuda.is_available():
        return
    torch.set_rng_state(state["cpu"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _fail_once(what: str, error: torch_checkpoint.CheckpointException) -> NoReturn:
    """torch raises on every rank when one has failed, with the errors of those that did: the first is told, once."""
    rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
    fail(CheckpointError(f"{what}: {first_line(cause)} (rank {rank})") if dist.get_rank() == 0 else None)
