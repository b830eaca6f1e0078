"""The sharded tensors of a checkpoint: Megatron's ``torch_dist`` format, readable in any parallel layout.

Of the optimizer's state, only tensors are saved. Hyperparameters come from the configuration and the schedule depends
only on the number of updates, so a run may resume with another learning rate or layout. AdamW's step count is set from
that number, too.
"""

from __future__ import annotations

import contextlib
import pickle  # nosec B403
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
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_most.checkpointing.optimizer_state import OptimizerState
from megatron_most.checkpointing.pickles import read_index, weights_only
from megatron_most.checkpointing.rank_save import PlannedSave, RankSave
from megatron_most.errors import CheckpointError, first_line
from megatron_most.model import MoSTModel
from megatron_most.model.fp8 import fp8_state, load_fp8_state
from megatron_most.parallel import fail, on_rank_zero

StateDict = dict[str, Any]


def plan_state(directory: Path, model_chunks: list[MoSTModel], optimizer: MegatronOptimizer, copy: bool) -> RankSave:
    """Plan what this rank writes of model, optimizer, FP8 histories and random states. A collective call.

    Args:
        directory: an empty directory. Files whose size does not depend on the model are written now.
        copy: copy what will be written, so that training may continue.

    Raises:
        CheckpointError: the storage cannot be written.
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
    """Load what :func:`plan_state` saved, in any layout; random states only with ``same_layout``. Collective.

    FP8 histories that the checkpoint does not have, or has for another number of steps, stay empty: the recipe is a
    choice of the run, and empty histories only make the first step use its own largest values.

    Args:
        optimizer: has not taken a step; it continues after ``num_updates`` updates.
        had_frozen_parts: the checkpoint may lack the optimizer state of some weights. That state then starts at zero.
    """
    state = _model_state(model_chunks)
    optimizer_state = OptimizerState(optimizer, state, loading=True)
    histories = fp8_state(model_chunks)
    stored = on_rank_zero(lambda: _stored_shapes(directory)) if had_frozen_parts or histories else {}
    if had_frozen_parts:
        optimizer_state.leave_out_all_but(stored)
    known = {key: history for key, history in histories.items() if stored.get(key) == history.global_shape}
    state |= {"optimizer": optimizer_state.tensors, "fp8": known}
    if same_layout:
        state["rng"] = _rng_state()
    loaded = _load(directory, state)
    _set_model_state(model_chunks, loaded)
    # This sets the fp32 copies of weights that were frozen; the other copies are in the checkpoint.
    optimizer.reload_model_params()
    # Megatron leaves out dictionaries in which this rank has no tensor.
    optimizer_state.apply(loaded.get("optimizer", {}), num_updates)
    empty = {key: history.data for key, history in histories.items() if key not in known}
    load_fp8_state(model_chunks, {**empty, **loaded.get("fp8", {})})
    if same_layout:
        _set_rng_state(loaded["rng"])


def load_model_state(directory: Path, model_chunks: list[MoSTModel]) -> None:
    """Load only the model's weights, in any layout. A collective call."""
    _set_model_state(model_chunks, _load(directory, _model_state(model_chunks)))


def _load(directory: Path, state: StateDict) -> StateDict:
    def check() -> None:
        read_index(directory)

    on_rank_zero(check)  # because Megatron opens the index with torch's reader
    strategy = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), _replica_group())
    try:
        with _without_torch_warnings(), weights_only():
            return dist_checkpointing.load(state, str(directory), strategy)
    except (OSError, CheckpointingException, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{directory}: cannot be loaded: {first_line(error)}") from error
    except torch_checkpoint.CheckpointException as error:
        _fail_once(f"{directory}: cannot be loaded", error)


def _stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint and their shapes."""
    entries = read_index(directory).state_dict_metadata
    return {key: tuple(entry.size) for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


@contextlib.contextmanager
def _without_torch_warnings() -> Iterator[None]:
    """Hide torch's warnings about how Megatron-Core 0.19.2 calls it, which users cannot change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        # serialization.py:230 loads a small object on each rank alone, with its arguments in an old order.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        warnings.filterwarnings("ignore", "The argument order of load has been changed", UserWarning)
        yield


def _replica_group() -> dist.ProcessGroup:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _model_state(model_chunks: list[MoSTModel]) -> StateDict:
    """Sharded weights by chunk, without ``_extra_state``: Transformer Engine's and other layers do not agree on it."""
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
            raise CheckpointError(f"the checkpoint lacks the weights {missing} and has unknown weights {unexpected}")


def _rng_state() -> ShardedObject:
    """Random states of this rank. Only a run in the same layout can use them."""
    state = {"cpu": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return ShardedObject("rng", state, (dist.get_world_size(),), (dist.get_rank(),))


def _set_rng_state(state: dict[str, Any]) -> None:
    """Restore saved random states, unless the kind of device changed, and with it the generators."""
    if ("cuda" in state) != torch.cuda.is_available():
        return
    torch.set_rng_state(state["cpu"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _fail_once(what: str, error: torch_checkpoint.CheckpointException) -> NoReturn:
    """Raise the error of the first rank that failed, only once: torch raises the errors of all ranks on every rank."""
    rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
    fail(CheckpointError(f"{what}: {first_line(cause)} (rank {rank})") if dist.get_rank() == 0 else None)
