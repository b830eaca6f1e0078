"""The routed experts of one layer on one rank, each a SwiGLU network ``down(silu(gate x) * up x)`` (arXiv 2002.05202).

Every backend takes the rank's tokens sorted by local expert and returns one output row for each. Under expert tensor
parallelism a rank's rows are partial sums, which the dispatcher reduces.

Shape letters: n (token, expert) pairs of this rank, e experts of a pool on this rank, f width of an expert (this rank's
part of it), h hidden size.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from megatron.core.jit import jit_fuser
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.checkpoint import checkpoint

from megatron_most.moe.expert_groups import ExpertGroups
from megatron_most.moe.sharding import ExpertShards, Offsets, in_logical_order
from megatron_most.precision import Fp8Product


class GroupedExperts(MegatronModule):
    """All experts of a rank, computed by one grouped matrix product for each pool and projection.

    Each pool has its own parameters, ``<pool>_experts.linear_fc1`` and ``.linear_fc2``, so that it can be frozen or
    have its own learning rate. They are sharded and initialized like Megatron's experts.

    Args:
        num_local_experts: experts of this rank, over all pools.
        groups: the experts of all modalities.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        groups: ExpertGroups,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        self.groups = groups
        self.expert_tensor_group = pg_collection.expt_tp
        self.expert_data_group = pg_collection.expt_dp
        local = groups.local_experts(pg_collection.ep.rank())
        assert sum(map(len, local.values())) == num_local_experts
        self._expert_indices = torch.arange(num_local_experts, device=torch.cuda.current_device())
        for pool, experts in local.items():
            if experts:
                self.add_module(f"{pool}_experts", ExpertPool(experts, config, self.expert_tensor_group.size()))

    def pools(self) -> dict[str, ExpertPool]:
        """Module name -> pool, in the order of the tokens. Pools without experts on this rank are left out."""
        return {name: pool for name, pool in self.named_children() if isinstance(pool, ExpertPool)}

    def forward(
        self, tokens: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Tokens ``[n, h]`` sorted by local expert, tokens per expert, and probs ``[n]`` -> ``[n, h]`` and no bias."""
        remaining = iter(tokens_per_expert.tolist())
        pools = list(self.pools().values())
        counts = [list(itertools.islice(remaining, len(pool.experts))) for pool in pools]
        ends = [list(itertools.accumulate(pool_counts)) for pool_counts in counts]
        on_host = torch.tensor([*itertools.chain(*ends)], dtype=torch.int32, pin_memory=tokens.is_cuda)
        on_device = on_host.to(tokens.device, non_blocking=True)  # pinned: the host does not wait for the device
        rows = [pool_ends[-1] for pool_ends in ends]
        pieces = zip(
            tokens.split(rows),
            on_device.split([len(pool.experts) for pool in pools]),
            probs.split(rows),
            counts,
            strict=True,
        )
        outputs = [pool(*piece) for pool, piece in zip(pools, pieces, strict=True)]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if output.requires_grad:
            # The backward of grouped_mm needs a dense gradient. An expanded one, as sum() gives, has strides of 0.
            output.register_hook(torch.Tensor.contiguous)
        return output, None

    @property
    def can_decode(self) -> bool:
        """Whether :meth:`decode` applies: this rank has all experts of the layer, whole and none in FP8."""
        is_whole = self.expert_tensor_group.size() == 1 and len(self._expert_indices) == self.groups.num_experts
        return is_whole and not any(product for pool in self.pools().values() for product in pool.fp8.values())

    def decode(self, tokens: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        """Output ``[t, h]`` for tokens ``[t, h]`` with probs ``[t, E]``, which are 0 where a token is not routed.

        Meant for the few tokens of a generation step: shapes do not depend on the routing, so the host never waits for
        the device. Every token gets as many rows as the largest top-k; unused rows are sorted last, and no product
        reads them.
        """
        top_k, nowhere = max(self.groups.top_k), len(self._expert_indices)
        probs, experts = probs.topk(top_k, dim=-1)
        experts, order = experts.masked_fill(probs == 0, nowhere).flatten().sort()
        ends = torch.searchsorted(experts, self._expert_indices, right=True, out_int32=True)
        pools = list(self.pools().values())
        sizes = [len(pool.experts) for pool in pools]
        is_before = [(experts < first)[:, None] for first in itertools.accumulate(sizes[:-1])]

        def products(name: str, rows: torch.Tensor) -> torch.Tensor:
            """Each row times the weights of its expert.

            The host does not know where a pool's rows start, so its first expert also multiplies the rows of the pools
            before it; those products are discarded.
            """
            first, *others = [
                torch.nn.functional.grouped_mm(rows, getattr(pool, name).transpose(1, 2), offs=pool_ends)
                for pool, pool_ends in zip(pools, ends.split(sizes), strict=True)
            ]
            for before, product in zip(is_before, others, strict=True):
                first = torch.where(before, first, product)
            return first

        rows = products("linear_fc1", tokens.index_select(0, order // top_k))
        rows = products("linear_fc2", _weighted_swiglu(rows, probs.flatten().index_select(0, order)))
        rows = rows.masked_fill((experts == nowhere)[:, None], 0)
        return torch.empty_like(rows).index_copy_(0, order, rows).view(len(tokens), top_k, -1).sum(dim=1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Weights in logical order, with the keys and shards of Megatron's ``SequentialMLP``."""
        state = {}
        for pool_name, pool in self.pools().items():
            shards = ExpertShards(
                pool.experts, self.groups.num_experts, self.expert_tensor_group, self.expert_data_group, sharded_offsets
            )
            for name, split_axis, num_parts in (("linear_fc1", 0, 2), ("linear_fc2", 1, 1)):
                key = f"{prefix}experts.{name}.weight"
                state[f"{prefix}{pool_name}.{name}"] = shards.of(key, getattr(pool, name), split_axis, num_parts)
        return state


class ExpertPool(torch.nn.Module):
    """The experts of one pool on one rank: ``linear_fc1 [e, 2f, h]``, gate above up, and ``linear_fc2 [e, h, f]``.

    ``fp8`` holds the FP8 product of each projection, or None where it is computed in the dtype of the weights.

    Args:
        experts: their logical indices.
    """

    linear_fc1: torch.nn.Parameter
    linear_fc2: torch.nn.Parameter

    def __init__(self, experts: tuple[int, ...], config: TransformerConfig, tensor_parallel_size: int) -> None:
        super().__init__()
        self.experts = experts
        self.fp8: dict[str, Fp8Product | None] = {"linear_fc1": None, "linear_fc2": None}
        self.recomputes_activation = (
            config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules
        )
        hidden, width = config.hidden_size, config.moe_ffn_hidden_size // tensor_parallel_size
        shapes = {
            "linear_fc1": ((len(experts), 2 * width, hidden), 1, config.init_method),
            "linear_fc2": ((len(experts), hidden, width), 2, config.output_layer_init_method),
        }
        for name, (shape, split_axis, init_method) in shapes.items():
            weight = torch.nn.Parameter(
                torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device())
            )
            set_tensor_model_parallel_attributes(weight, True, split_axis, 1)
            # This generator differs between expert-parallel ranks and agrees between the copies of an expert.
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                init_method(weight)
            self.register_parameter(name, weight)

    def forward(self, tokens: torch.Tensor, ends: torch.Tensor, probs: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Tokens ``[n, h]`` sorted by expert and probs ``[n]`` -> ``[n, h]``.

        Args:
            ends: ``[e]`` int32, where each expert's tokens end.
            counts: tokens of each expert, on the host.
        """
        fc1, fc2 = self.fp8["linear_fc1"], self.fp8["linear_fc2"]
        if fc1 is not None and fc2 is not None:
            places, ends, num_rows = fc1.padding(counts, tokens.device)
            tokens = tokens.new_zeros(num_rows, tokens.shape[1]).index_copy(0, places, tokens)
            probs = probs.new_zeros(num_rows).index_copy(0, places, probs)
            hidden = weighted_swiglu(fc1.grouped(tokens, self.linear_fc1, ends), probs)
            return fc2.grouped(hidden, self.linear_fc2, ends)[places]
        hidden = torch.nn.functional.grouped_mm(tokens, self.linear_fc1.transpose(1, 2), offs=ends)
        if not self.recomputes_activation:
            return self._activate_and_project(hidden, probs, ends)
        # Recomputation stops at the last tensor that the backward needs, the input of linear_fc2: that product is not
        # repeated. Megatron's CheckpointWithoutOutput does the same, but compiles a C++ extension when it first runs.
        return checkpoint(
            self._activate_and_project, hidden, probs, ends, use_reentrant=False, preserve_rng_state=False
        )

    def _activate_and_project(self, hidden: torch.Tensor, probs: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """``[n, 2f]``, probs ``[n]`` and the ends of :meth:`forward` -> ``[n, h]``."""
        hidden = weighted_swiglu(hidden, probs)
        return torch.nn.functional.grouped_mm(hidden, self.linear_fc2.transpose(1, 2), offs=ends)


class _LogicalCheckpoints(MegatronModule):
    """Makes Megatron's experts number their checkpoint shards by logical expert instead of physical position."""

    def __init__(self, *arguments: Any, groups: ExpertGroups, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.groups = groups

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """See :meth:`GroupedExperts.sharded_state_dict`."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return in_logical_order(state, len(sharded_offsets), self.groups.physical_to_logical)


class SequentialExperts(_LogicalCheckpoints, SequentialMLP):
    """One Megatron MLP per expert, run one after another. Slow; the reference for the other backends."""


class TransformerEngineExperts(_LogicalCheckpoints, TEGroupedMLP):
    """Transformer Engine's grouped linear layers."""


def weighted_swiglu(gate_and_up: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """``[n, 2f]`` and ``[n]`` -> ``silu(gate) * up * prob``, ``[n, f]``, computed in the dtype of the probs.

    Compiled once for all n from 2 on. torch.compile treats the sizes 0 and 1 as constants and would recompile for them.
    """
    if len(probs) < 2:
        return _weighted_swiglu(gate_and_up, probs)
    for tensor in (gate_and_up, probs):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _compiled_swiglu(gate_and_up, probs)


def _weighted_swiglu(gate_and_up: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up * probs[:, None]).to(gate_and_up.dtype)


_compiled_swiglu = jit_fuser(_weighted_swiglu)
