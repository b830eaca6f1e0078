"""Expected time of a step, part by part: a roofline, not a measurement.

Each part takes its matrix products at a share of the peak, what its other operators read and write at a share of the
memory bandwidth, and its messages at a share of the slowest link (:class:`~megatron_most.planning.gpus.Efficiency`).
The times of parts add up: of all communication, only half of the reduction of gradients overlaps with computation. A
host that starts kernels too slowly, the input pipeline, validation and checkpoints are not included; neither are the
iterations of Muon.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_most.config import RunConfig
from megatron_most.model.most_model import padded
from megatron_most.moe import ExpertGroups
from megatron_most.planning.flops import head_sizes, mean_forward_flops
from megatron_most.planning.gpus import GPUS_PER_NODE, Efficiency, Gpu
from megatron_most.planning.memory import (
    computed_pairs,
    element_size,
    expert_load,
    memory_of_rank,
    positions_of_group,
    sent_pairs,
)
from megatron_most.planning.rows import RowContents
from megatron_most.planning.shards import code_rows, is_moe_layer, learning_sizes, shard_sizes, stage_layers

RECOMPUTED = {
    "none": (),
    "moe_act": (),  # the activation alone, which is no product
    "moe": ("router", "dispatch", "experts", "shared expert"),
    "full": ("attention", "dense layers", "router", "dispatch", "experts", "shared expert"),
}
"""Parts whose forward runs a second time, by ``training.recompute``."""

_ROUTER_KERNELS = 38
"""Operators of a router, forward and backward ("Operators of a step" in docs/performance.md)."""
_FUSED_LOGIT, _LOGIT = 8, 52
"""Bytes that a logit moves, forward and backward, in Transformer Engine's cross entropy and in Megatron's in fp32."""


def step_seconds(config: RunConfig, world_size: int, gpu: Gpu, imbalance: float, rows: RowContents) -> dict[str, float]:
    """Seconds of each part of a step on the slowest ranks; they add up to the step."""
    parallel = config.parallel
    pipeline, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    micro_batches = config.num_microbatches(parallel.data_parallel_size(world_size))
    roofline = _Roofline(config, world_size, gpu, imbalance, rows)
    stages = [roofline.stage(rank) for rank in range(pipeline)]
    slowest = max(stages, key=lambda stage: sum(stage.values()))
    parts = {part: micro_batches * seconds for part, seconds in slowest.items()}
    # The first and last micro-batch leave stages idle (arXiv 2104.04473, section 2.2).
    parts["pipeline bubble"] = sum(slowest.values()) * (pipeline - 1) / virtual
    parts["optimizer"] = max(roofline.optimizer(rank) for rank in range(pipeline))
    parts["communication"] += max(roofline.reduction(rank) for rank in range(pipeline))
    return {part: seconds for part, seconds in parts.items() if seconds > 0}


@dataclass(frozen=True)
class _Roofline:
    """Times of a micro-batch, forward and backward, on the busiest rank of a stage."""

    config: RunConfig
    world_size: int
    gpu: Gpu
    imbalance: float
    rows: RowContents

    def stage(self, pipeline_rank: int) -> dict[str, float]:
        config, parallel = self.config, self.config.parallel
        parts: dict[str, float] = defaultdict(float)
        for layer in stage_layers(config, pipeline_rank):
            for part, seconds in (self._moe_layer if is_moe_layer(config, layer) else self._dense_layer).items():
                parts[part] += seconds
        for part in RECOMPUTED[config.training.recompute]:
            parts[part] *= 4 / 3  # backward takes two forwards
        if pipeline_rank == 0:
            parts["embeddings"] += self._embeddings
        if pipeline_rank == parallel.pipeline_model_parallel_size - 1:
            parts["heads and loss"] += self._heads
        learning = sum(learning_sizes(config, pipeline_rank, 0).values())
        parts["weight gradients"] += self._memory(learning * (element_size(config) + 8))  # added to an fp32 buffer
        parts["communication"] += self._messages(len(stage_layers(config, pipeline_rank)))
        return parts

    def optimizer(self, pipeline_rank: int) -> float:
        """AdamW reads and writes its state, reads gradients and writes weights, all of a rank's share."""
        state = memory_of_rank(self.config, self.world_size, pipeline_rank, 0, rows=self.rows).optimizer
        return self._memory(2.5 * state)

    def reduction(self, pipeline_rank: int) -> float:
        """What remains of the reduction of fp32 gradients and the gathering of weights."""
        parallel = self.config.parallel
        tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        num_bytes = sum(shard_sizes(self.config, pipeline_rank, 0).values()) * (4 + element_size(self.config))
        exposed = 1 - Efficiency.HIDDEN_REDUCTION
        return exposed * self._send(num_bytes, self.world_size // (tensor * pipeline), stride=tensor)

    @cached_property
    def _positions(self) -> float:
        """Positions of a micro-batch whose work is this rank's, the work of a replica's ranks divided evenly."""
        return positions_of_group(self.config) / self.config.parallel.tensor_model_parallel_size

    @cached_property
    def _flops(self) -> dict[str, float]:
        """FLOPs of a micro-batch on this rank, forward and backward, over all layers."""
        return {part: 3 * self._positions * flops for part, flops in mean_forward_flops(self.config, self.rows).items()}

    @cached_property
    def _pairs(self) -> float:
        """(Token, expert) pairs of the busiest expert-parallel rank."""
        loads = expert_load(self.config, self.rows)
        uneven = self.imbalance if len(loads) > 1 else 1.0
        return computed_pairs(self.config, loads.index(max(loads)), self.rows) * uneven

    @cached_property
    def _attention(self) -> dict[str, float]:
        model, layers = self.config.model, self.config.model.num_layers
        query, value = head_sizes(self.config)
        core = self._flops["attention_core"] / 3 * 3.5  # flash attention's backward computes the scores once more
        # Two norms and two residuals; rotation and layout of queries, keys, values and outputs.
        moved = 10 * model.hidden_size + 4 * model.attention.num_attention_heads * (query + value)
        return {
            "attention": self._products(self._flops["attention"] / layers)
            + core / layers / (self.gpu.peak * Efficiency.ATTENTION)
            + self._memory(3 * moved * self._positions * element_size(self.config))
        }

    @cached_property
    def _dense_layer(self) -> dict[str, float]:
        model = self.config.model
        flops = self._flops["dense_ffn"] / max(1, model.first_k_dense_replace)
        return {**self._attention, "dense layers": self._mlp(flops, model.ffn_hidden_size)}

    @cached_property
    def _moe_layer(self) -> dict[str, float]:
        config, moe = self.config, self.config.model.moe
        moe_layers = config.model.num_layers - config.model.first_k_dense_replace
        hidden = config.model.hidden_size * element_size(config)
        groups = ExpertGroups.from_config(moe, config.parallel.expert_model_parallel_size)
        spread = config.parallel.expert_model_parallel_size * config.parallel.expert_tensor_size > 1
        # Rows are sorted by expert and back, received rows by local expert and back, and the pools joined.
        moved = 2 * (self._positions + sent_pairs(config, self.rows)) + 4 * self._pairs * spread
        moved += 2 * self._pairs * (len(groups.pools) > 1)
        width = moe.moe_ffn_hidden_size / config.parallel.expert_tensor_size
        experts = self._experts(3 * 6 * config.model.hidden_size * width * self._pairs)
        if config.training.recompute == "moe_act":
            experts += self._memory(3 * width * self._pairs * element_size(config))
        return {
            **self._attention,
            "router": _ROUTER_KERNELS * Efficiency.SMALL_KERNEL
            + self._memory(20 * 4 * moe.num_experts * self._positions),
            "dispatch": self._memory(2 * moved * hidden),
            "experts": experts,
            "shared expert": self._mlp(
                self._flops["shared_experts"] / moe_layers, moe.moe_shared_expert_intermediate_size
            ),
        }

    def _experts(self, flops: float) -> float:
        """Grouped products, slow where an expert has little to do; SwiGLU is part of what was measured."""
        local = self.config.model.moe.num_experts / self.config.parallel.expert_model_parallel_size
        sizes, shares = zip(*Efficiency.EXPERTS, strict=True)
        share = float(np.interp(math.log(flops / local), np.log(sizes), shares))
        return flops / (self.gpu.peak * share)

    def _mlp(self, flops: float, width: int) -> float:
        return self._products(flops) + self._memory(9 * width * self._positions * element_size(self.config))

    @cached_property
    def _embeddings(self) -> float:
        """Lookups and their gradients, and a gradient table of all rows."""
        config, vocab = self.config, self.config.vocab
        looked_up = (2 + vocab.num_codebooks * (code_rows(config) > 0)) * self._positions
        table = (padded(vocab.size) + code_rows(config)) / config.parallel.tensor_model_parallel_size
        return self._memory((3 * looked_up + table) * config.model.hidden_size * element_size(config))

    @cached_property
    def _heads(self) -> float:
        config, rows = self.config, self.rows
        logits = rows.targets * padded(config.vocab.size) + rows.frame_targets * code_rows(config)
        num_bytes = _FUSED_LOGIT if config.model.transformer_impl == "transformer_engine" else _LOGIT
        return self._products(self._flops["heads"]) + self._memory(num_bytes * logits * self._positions)

    def _messages(self, num_layers: int) -> float:
        """What a rank sends in the layers of a stage, and to the next stage."""
        config, parallel = self.config, self.config.parallel
        tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
        row, recompute = config.model.hidden_size * element_size(config), config.training.recompute
        passes, moe_passes = 2 + (recompute == "full"), 2 + (recompute in ("moe", "full"))
        moe_share = 1 - config.model.first_k_dense_replace / config.model.num_layers
        # The tensor group gathers and scatters the tokens of all its ranks around attention and around an MLP.
        total = self._send(passes * num_layers * 4 * self._positions * tensor * row, tensor)
        total += self._send(passes * num_layers * 2 * self._positions * context * row, context, stride=tensor)
        expert_ranks = parallel.expert_model_parallel_size * parallel.expert_tensor_size
        total += self._send(moe_passes * moe_share * num_layers * 2 * self._pairs * row, expert_ranks)
        pipeline, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
        stride = self.world_size // pipeline
        return total + self._send(2 * self._positions * pipeline * virtual * row, pipeline, stride)

    def _products(self, flops: float) -> float:
        return flops / (self.gpu.peak * Efficiency.PRODUCTS)

    def _memory(self, num_bytes: float) -> float:
        return num_bytes / (self.gpu.memory_bandwidth * Efficiency.MEMORY)

    def _send(self, num_bytes: float, ranks: int, stride: int = 1) -> float:
        """Each of ``ranks`` ranks, ``stride`` apart, keeps its own share of ``num_bytes`` and sends the others."""
        inside = ranks * stride <= GPUS_PER_NODE
        bandwidth = (
            self.gpu.node_bandwidth * Efficiency.NODE if inside else self.gpu.network_bandwidth * Efficiency.NETWORK
        )
        return num_bytes * (ranks - 1) / ranks / bandwidth
