"""The optimizer's state as sharded tensors, each in the shape of the parameter it belongs to.

Keys name parameters (``optimizer.state.exp_avg.<parameter>``), whether or not the state is sharded over data-parallel
ranks, so that any parallel layout and either kind of optimizer can load it. Each expert has its own keys
(``<parameter>.<logical expert>``), because frozen experts have no state and a tensor in a checkpoint has no holes.

Megatron's ``fully_reshardable`` format has the same goal, but in 0.19.2 it mixes up parameters if a gradient buffer has
several buckets with padding between them: optimizer/distrib_optimizer.py:1790 cuts a buffer without padding at the
positions of one with padding.

Shape letters: n elements of a bucket, d data-parallel ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

type Sharded = ShardedTensor | ShardedTensorFactory
_SHARDED = (ShardedTensor, ShardedTensorFactory)
_MOMENTS = ("exp_avg", "exp_avg_sq")
_MASTER = "fp32_param"
_EXPERTS = ".mlp.experts."


class OptimizerState:
    """The state of an optimizer, to save it, or to load it and then :meth:`apply` it.

    Args:
        model_state: the sharded state dict of the model whose parameters are optimized.
        loading: make tensors to load into. State that does not exist yet, before the first update, is allocated.
    """

    def __init__(self, optimizer: MegatronOptimizer, model_state: dict[str, Any], loading: bool) -> None:
        # With expert parallelism, dense and expert parameters have an optimizer each; otherwise they share one.
        self.parts = [part for part in optimizer.chained_optimizers if part.optimizer is not None]
        self.tensors: dict[str, Sharded] = {}
        self._destinations: dict[str, tuple[torch.Tensor, slice]] = {}
        model_state = _expert_by_expert(model_state)
        metadata = {sharded.data: sharded for sharded in nested_values(model_state) if isinstance(sharded, _SHARDED)}
        for index, part in enumerate(self.parts):
            if not part.optimizer.state:
                part.init_state_fn(part.optimizer, part.config)
                _set_step(part.optimizer, 0)
            if isinstance(part, DistributedOptimizer):
                items = _split_state(part, metadata, loading)
            else:
                items = _whole_state(part, model_state, loading)
            for place, (sharded, destination) in enumerate(items):
                # The key of a sharded tensor is not unique: the experts of a layer share one.
                self.tensors[f"{index}/{place}"] = sharded
                self._destinations[f"{index}/{place}"] = destination

    def leave_out_all_but(self, stored: Collection[str]) -> None:
        """Load only ``stored`` keys. The rest of the state stays as it is before the first step."""
        for name, sharded in list(self.tensors.items()):
            pieces = sharded.build() if isinstance(sharded, ShardedTensorFactory) else [sharded]
            if any(piece.key not in stored for piece in pieces):
                del self.tensors[name], self._destinations[name]

    @torch.no_grad()
    def apply(self, loaded: dict[str, torch.Tensor], num_updates: int) -> None:
        """Copy loaded tensors, named as in :attr:`tensors`, into the optimizer and set its step to ``num_updates``."""
        for name, (destination, part_of_parameter) in self._destinations.items():
            destination.view(-1).copy_(loaded[name].reshape(-1)[part_of_parameter])
        for part in self.parts:
            _set_step(part.optimizer, num_updates)


def _expert_by_expert(model_state: dict[str, Any]) -> dict[str, Any]:
    """The state with one tensor per expert instead of one for all experts of a layer."""

    def own(tensor: ShardedTensor) -> ShardedTensor:
        axis = tensor.prepend_axis_num - 1

        def without(values: tuple[int, ...]) -> tuple[int, ...]:
            return (*values[:axis], *values[axis + 1 :])

        return dataclasses.replace(
            tensor,
            key=f"{tensor.key}.{tensor.global_offset[axis]}",
            global_shape=without(tensor.global_shape),
            global_offset=without(tensor.global_offset),
            axis_fragmentations=without(tensor.axis_fragmentations),
            prepend_axis_num=axis,
        )

    def own_pieces(factory: ShardedTensorFactory) -> ShardedTensorFactory:
        def build(*arguments: Any) -> list[ShardedTensor]:
            return [own(piece) for piece in factory.build_fn(*arguments)]

        return dataclasses.replace(factory, build_fn=build)

    def change(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: change(inner) for key, inner in value.items()}
        if isinstance(value, _SHARDED) and _EXPERTS in value.key:
            return own(value) if isinstance(value, ShardedTensor) else own_pieces(value)
        return value

    return change(model_state)


Item = tuple[Sharded, tuple[torch.Tensor, slice]]
"""A sharded tensor, and where it is applied: a tensor of the optimizer and the elements of the parameter in it."""


def _split_state(part: DistributedOptimizer, metadata: dict[torch.Tensor, Sharded], loading: bool) -> Iterator[Item]:
    """State of which this rank holds a slice of each bucket. To save it, the slices are gathered."""
    for buffer, ranges in zip(part.buffers, part.gbuf_ranges, strict=True):
        (bucket_ranges,) = ranges.values()
        for bucket, bucket_range in zip(buffer.buckets, bucket_ranges, strict=True):
            param_ranges = bucket_range["param_map"]
            mine = {param: _own_state(part, param) for param in param_ranges}
            for key in (*_MOMENTS, _MASTER):
                holders = [param for param in bucket.params_list if key != _MASTER or param.dtype != torch.float32]
                if not holders:
                    continue
                gathered = None if loading else _gather(part, bucket, param_ranges, {p: mine[p][key] for p in mine})
                for param in holders:
                    start, end, _ = buffer.param_index_map[param]
                    if gathered is None:
                        whole = torch.empty(param.shape, dtype=torch.float32)
                    else:
                        whole = gathered[start - bucket.offset : end - bucket.offset].view(param.shape)
                    sharded = make_sharded_optimizer_tensor(metadata[param], whole, prefix=f"optimizer.state.{key}")
                    destination = (torch.empty(0), slice(0, 0))
                    if param in mine:
                        own = param_ranges[param]["param"]
                        destination = (mine[param][key], slice(own.start, own.end))
                    yield sharded, destination


def _own_state(part: DistributedOptimizer, param: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """This rank's slices: the moments, and the fp32 copy (for an fp32 parameter, a view of the parameter)."""
    group, place = part.model_param_group_index_map[param]
    main = part.optimizer.param_groups[group]["params"][place]
    return {**{key: part.optimizer.state[main][key] for key in _MOMENTS}, _MASTER: main}


def _gather(
    part: DistributedOptimizer, bucket: Any, param_ranges: dict, slices: dict[torch.nn.Parameter, torch.Tensor]
) -> torch.Tensor:
    """``[n]`` on the CPU: a bucket's state, gathered from the ``[n / d]`` of each data-parallel rank."""
    group = part.data_parallel_group
    size = bucket.grad_data.numel()
    local = torch.zeros(size // group.size(), dtype=torch.float32, device=bucket.grad_data.device)
    for param, values in slices.items():
        place = param_ranges[param]["gbuf_local"]
        local[place.start : place.end] = values.detach()
    whole = torch.empty(size, dtype=torch.float32, device=local.device)
    dist.all_gather_into_tensor(whole, local, group=group)
    return whole.cpu()


def _whole_state(part: MegatronOptimizer, model_state: dict[str, Any], loading: bool) -> Iterator[Item]:
    """State that every data-parallel rank holds in full."""
    for sharded in nested_values(part.sharded_state_dict(model_state)):
        if isinstance(sharded, _SHARDED):
            destination = (sharded.data, slice(None))
            if loading:
                # Not the optimizer's own tensors: they are set from the weights before the loaded state is applied.
                sharded = dataclasses.replace(sharded, data=torch.empty_like(sharded.data))
            yield sharded, destination


def _set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the step count. torch has one per parameter, in a tensor; fused optimizers one per group; Muon has none."""
    for group in optimizer.param_groups:
        if not isinstance(optimizer, torch.optim.Adam):  # and not AdamW, its subclass
            group["step"] = step
            continue
        for parameter in group["params"]:
            # torch's fused kernel reads the count on the device, other kernels on the host.
            device = parameter.device if group["fused"] else "cpu"
            optimizer.state[parameter]["step"] = torch.full((), float(step), device=device)
