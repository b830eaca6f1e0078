"""The routed experts of one layer on one rank, each a SwiGLU network ``down(silu(gate x) * up x)`` (arXiv 2002.05202).

Every backend takes the tokens of its rank sorted by local expert and gives one row of output for each. Under expert
tensor parallelism a rank's rows are its share of a sum; the dispatcher adds them up.

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
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.checkpoint import checkpoint

from megatron_most.config import MoEConfig
from megatron_most.moe.expert_groups import ExpertGroups
from megatron_most.moe.sharding import Offsets, in_logical_order, shard_by_expert
from megatron_most.precision import Fp8Product


class GroupedExperts(MegatronModule):
    """All experts of a rank as grouped matrix products: one for each pool and projection.

    A pool's weights are parameters of their own, ``<pool>_experts.linear_fc1`` and ``.linear_fc2``, so that a pool can
    be frozen or have its own learning rate. They are distributed and initialized as Megatron's experts are.

    Args:
        num_local_experts: experts of this rank, of all pools.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        moe: MoEConfig,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        self.groups = ExpertGroups.from_config(moe, pg_collection.ep.size())
        self.expert_tensor_group = pg_collection.expt_tp
        self.expert_data_group = pg_collection.expt_dp
        local = self.groups.local_experts(pg_collection.ep.rank())
        assert sum(map(len, local.values())) == num_local_experts
        # A table and no buffer, as the router's are.
        self._numbers = torch.arange(num_local_experts, device=torch.cuda.current_device())
        for pool, experts in local.items():
            if experts:
                self.add_module(f"{pool}_experts", ExpertPool(experts, config, self.expert_tensor_group.size()))

    def forward(
        self, tokens: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Tokens ``[n, h]`` sorted by local expert, their number for each, and probs ``[n]`` -> ``[n, h]``, no bias."""
        remaining = iter(tokens_per_expert.tolist())
        pools = list(self.children())
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
            # The backward of grouped_mm takes dense gradients only, not one row that is repeated by a stride of 0.
            output.register_hook(torch.Tensor.contiguous)
        return output, None

    @property
    def can_decode(self) -> bool:
        """Whether :meth:`decode` computes these experts: all of the layer's, and none in FP8."""
        is_whole = self.expert_tensor_group.size() == 1 and len(self._numbers) == self.groups.num_experts
        return is_whole and not any(product for pool in self.children() for product in pool.fp8.values())

    def decode(self, tokens: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        """What the layer's experts add to tokens ``[t, h]`` with probs ``[t, E]``, 0 where a token is not sent.

        For the few tokens of a step of generation: all shapes are known without asking the device where tokens go. A
        token has rows for the largest top-k; those that it does not need come last, and no product reads them.
        """
        top_k, nowhere = max(self.groups.top_k), len(self._numbers)
        probs, experts = probs.topk(top_k, dim=-1)
        experts, order = experts.masked_fill(probs == 0, nowhere).flatten().sort()
        ends = torch.searchsorted(experts, self._numbers, right=True, out_int32=True)
        pools = list(self.children())
        sizes = [len(pool.experts) for pool in pools]
        is_before = [(experts < first)[:, None] for first in itertools.accumulate(sizes[:-1])]

        def products(name: str, rows: torch.Tensor) -> torch.Tensor:
            """Each row with the weights of its expert, which has the rows up to its end.

            A pool's first expert also takes the rows of the pools before, for the host does not know where these end.
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
        """Weights in logical order, named and cut as Megatron's ``SequentialMLP`` names and cuts them."""
        return {
            f"{prefix}{pool_name}.{name}": shard_by_expert(
                f"{prefix}experts.{name}.weight",
                getattr(pool, name),
                pool.experts,
                self.groups.num_experts,
                sharded_offsets,
                split_axis=split_axis,
                num_parts=num_parts,
                tensor_group=self.expert_tensor_group,
                data_group=self.expert_data_group,
            )
            for pool_name, pool in self.named_children()
            for name, split_axis, num_parts in (("linear_fc1", 0, 2), ("linear_fc2", 1, 1))
        }


class ExpertPool(torch.nn.Module):
    """The experts of one pool on one rank: ``linear_fc1 [e, 2f, h]``, gate above up, and ``linear_fc2 [e, h, f]``.

    ``fp8`` holds who computes the two products in FP8, None where they stay in the dtype of the weights.

    Args:
        experts: their logical indices.
    """

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
            # The generator that differs between the ranks of an expert-parallel group and agrees between copies.
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                init_method(weight)
            self.register_parameter(name, weight)

    def forward(self, tokens: torch.Tensor, ends: torch.Tensor, probs: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Tokens ``[n, h]`` of which expert i has those from ``ends[i - 1]`` to ``ends[i]``; probs ``[n]``.

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


class _LogicalCheckpoints:
    """Megatron's experts, which number themselves by physical position in checkpoints, with logical numbers there."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: ProcessGroupCollection,
        *,
        moe: MoEConfig,
        name: str | None = None,
    ) -> None:
        super().__init__(num_local_experts, config, submodules, pg_collection, name)
        self.groups = ExpertGroups.from_config(moe, pg_collection.ep.size())

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As :meth:`GroupedExperts.sharded_state_dict`."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return in_logical_order(state, len(sharded_offsets), self.groups.physical_to_logical)


class SequentialExperts(_LogicalCheckpoints, SequentialMLP):
    """One Megatron MLP for each expert, one after another: slow, and what the other backends are compared with."""


class TransformerEngineExperts(_LogicalCheckpoints, TEGroupedMLP):
    """Transformer Engine's grouped linear layers."""


def weighted_swiglu(gate_and_up: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """``[n, 2f]`` and ``[n]`` -> ``silu(gate) * up * prob``, ``[n, f]``, multiplied in the dtype of the probs.

    Compiled once for any n, which is another one in every call. torch.compile takes 0 and 1 for constants and would
    compile once more for each.
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
