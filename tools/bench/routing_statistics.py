#!/usr/bin/env python
"""The cost of routing statistics: forward and backward of a training step with and without them.

    python -m tools.bench.routing_statistics [--blocks 15] [--threads 1]

The model is DeepSeek-V2-Lite scaled down (64 experts, top-6, one dense and one MoE layer). Timed are forward and
backward of one micro-batch of 1024 positions, without the update, so the share of a whole step is smaller. The time of
counting alone, which is steadier than the difference of two large numbers, and of the reduction of a logged line are
also printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from megatron_most import cli, parallel, platform
from megatron_most.config.load import build_config
from megatron_most.data.loading.batch import Batch
from megatron_most.moe import ModalityAwareRouter, collect_routing
from megatron_most.moe.balance import sum_by_modality
from megatron_most.moe.routing_statistics import RoutingStatistics
from megatron_most.training.train_step import build_train_state, compute_gradients
from tools.bench import paired

LENGTH, NUM_TEXT_IDS = 1024, 1000
HUNDRED = "one layer's counting, 100 times"
MODEL = {
    "vocab": {"text_vocab_size": NUM_TEXT_IDS, "num_codebooks": 4, "codebook_size": 1000},
    "model": {
        "num_layers": 2,
        "hidden_size": 512,
        "ffn_hidden_size": 2736,
        "attention": {
            "num_attention_heads": 8,
            "kv_lora_rank": 128,
            "qk_head_dim": 64,
            "qk_pos_emb_head_dim": 32,
            "v_head_dim": 64,
        },
        "moe": {"moe_ffn_hidden_size": 352, "moe_shared_expert_intermediate_size": 704},
    },
    "data": {"seq_length": LENGTH, "packing": False},
    "precision": {"dtype": "fp32"},
    "training": {"micro_batch_size": 1, "global_batch_size": 1},
    "optimizer": {"overlap_grad_reduce": False},
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    paired.add_arguments(parser)
    return parser


def measure(arguments: argparse.Namespace) -> None:
    cli.require_positive(arguments, "blocks", "threads")
    platform.install()
    torch.set_num_threads(arguments.threads)
    config = build_config("bench", MODEL)
    parallel.initialize(config.parallel, config.seed)
    state = build_train_state(config)
    chunks = state.model_chunks
    batch = random_batch().to(platform.device())
    routers = [module for module in chunks[0].modules() if isinstance(module, ModalityAwareRouter)]

    def step() -> None:
        compute_gradients(state, [batch])

    def without() -> None:
        switched_off(routers, step)

    statistics = routers[0].statistics
    tokens = recorded(routers[0], step)
    arms = {
        "step without statistics": without,
        "step with statistics": step,
        HUNDRED: lambda: [statistics.count(*tokens) for _ in range(100)],
        "reduction of a logged line": lambda: collect_routing(chunks, config.model),
    }
    result = paired.compare(arms, "step without statistics", blocks=arguments.blocks)
    print(result)
    wall, cpu = (len(routers) / 100 * ratios[HUNDRED].median for ratios in (result.wall, result.cpu))
    print(f"counting in all MoE layers: {wall:.3%} of the step's wall time, {cpu:.3%} of its CPU time")
    parallel.destroy()


def random_batch() -> Batch:
    """One row without padding, four fifths of it codec frames."""
    generator = torch.Generator().manual_seed(0)
    config = build_config("bench", MODEL)
    is_frame = torch.rand(1, LENGTH, generator=generator) < 0.8
    ids = torch.randint(0, NUM_TEXT_IDS, (1, LENGTH), generator=generator).where(~is_frame, config.vocab.frame)
    codes = torch.randint(0, 1000, (1, LENGTH, 4), generator=generator).where(is_frame[..., None], -1)
    return Batch(
        ids=ids,
        labels=ids,
        loss_mask=torch.ones(1, LENGTH),
        modality=config.vocab.modality_of(ids),
        is_padding=torch.zeros(1, LENGTH, dtype=torch.bool),
        task=torch.zeros_like(ids),
        codes=codes,
        code_labels=codes,
        cu_seqlens=None,
    )


def switched_off(routers: list[ModalityAwareRouter], action: Callable[[], None]) -> None:
    """Run ``action`` with routers that count only the pairs that their losses need."""

    def pairs_alone(routing_map: torch.Tensor, _scores, _group_probs, membership: torch.Tensor, num_sequences: int):
        return sum_by_modality(membership, routing_map.float(), num_sequences)

    for router in routers:
        router.statistics.count, router.statistics.add_loss = pairs_alone, lambda *arguments: None
    action()
    for router in routers:
        del router.statistics.count, router.statistics.add_loss


def recorded(router: ModalityAwareRouter, action: Callable[[], None]) -> tuple[torch.Tensor, ...]:
    """Arguments of the first call of the router's statistics during ``action``."""
    calls: list[tuple[torch.Tensor, ...]] = []
    count = type(router.statistics).count

    def record(statistics: RoutingStatistics, *arguments: torch.Tensor) -> torch.Tensor:
        calls.append(arguments)
        return count(statistics, *arguments)

    type(router.statistics).count = record
    try:
        action()
    finally:
        type(router.statistics).count = count
    return calls[0]


if __name__ == "__main__":
    cli.run(make_parser(), measure)
