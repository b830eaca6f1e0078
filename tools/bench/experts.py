#!/usr/bin/env python
"""Speed of the routed experts of one layer: grouped matrix products, sequential experts, a loop over masks.

    python -m tools.bench.experts [--tokens N] [--hidden N] [--ffn N] [--experts N] [--top-k N] [--blocks N]

Times forward and backward on one rank, from tokens and their routing to one output per token. The published
implementations of DeepSeek-V2 and MoST train with the loop over masks: every expert finds its tokens in a boolean mask.
Defaults are DeepSeek-V2-Lite's experts in bf16 on a GPU, and at a quarter of their width in fp32 on a CPU.

Shape letters: n tokens, k experts of a token, E experts, f width of an expert, h hidden size.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_most import cli, parallel, platform
from megatron_most.config import RunConfig
from megatron_most.config.load import build_config
from megatron_most.errors import MostError
from megatron_most.model.specs import experts_spec
from megatron_most.model.transformer_config import transformer_config
from megatron_most.moe import ExpertGroups
from megatron_most.moe.dispatcher import AlltoAllDispatcher
from tools.bench import paired

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest output


def bench_experts(arguments: argparse.Namespace) -> None:
    cli.require_positive(arguments, "tokens", "hidden", "ffn", "experts", "top_k", "blocks", "threads")
    platform.install()
    platform.set_threads(arguments.threads)
    configs = {backend: layer_config(arguments, backend) for backend in ("grouped", "sequential")}
    parallel.initialize(configs["grouped"].parallel, configs["grouped"].seed)
    backends = {backend: build_experts(config) for backend, config in configs.items()}
    copy_weights(backends["grouped"], backends["sequential"])
    separate = separate_matrices(backends["sequential"])
    tokens, choice, weights = routed_tokens(arguments, next(backends["grouped"].parameters()).dtype)
    dispatcher = build_dispatcher(configs["grouped"])
    computations: dict[str, Callable[[], torch.Tensor]] = {
        "grouped": lambda: dispatched(dispatcher, backends["grouped"], tokens, choice, weights),
        "sequential": lambda: dispatched(dispatcher, backends["sequential"], tokens, choice, weights),
        "loop over masks": lambda: loop_over_masks(separate, tokens, choice, weights),
    }
    outputs = {arm: compute().detach() for arm, compute in computations.items()}
    for arm, output in outputs.items():
        difference = (output - outputs["grouped"]).abs().max() / outputs["grouped"].abs().max()
        if difference > TOLERANCE[tokens.dtype]:
            raise MostError(f"{arm}: differs from grouped by {difference:.1e} of the largest output; nothing was timed")

    parameters = [tokens, weights, *(p for experts in backends.values() for p in experts.parameters())]
    parameters += [matrix for matrices in separate for matrix in matrices]
    gradient = torch.randn_like(tokens)

    def forward_and_backward(compute: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def call() -> None:
            compute().backward(gradient)
            for parameter in parameters:
                parameter.grad = None

        return call

    arms = {arm: forward_and_backward(compute) for arm, compute in computations.items()}
    comparison = paired.compare(arms, "grouped", blocks=arguments.blocks)
    # Three h x f matrices for each pair, two operations per element; the backward pass takes twice the forward's.
    operations = 3 * 2 * 3 * arguments.tokens * arguments.top_k * arguments.hidden * arguments.ffn
    print(
        f"{arguments.tokens} tokens x top-{arguments.top_k} of {arguments.experts} experts, hidden {arguments.hidden},"
        f" ffn {arguments.ffn}, {tokens.dtype}, {tokens.device}"
    )
    print(comparison)
    print(f"  grouped: {operations / comparison.seconds['grouped'] / 1e12:.3f} TFLOP/s")
    parallel.destroy()


def layer_config(arguments: argparse.Namespace, backend: str) -> RunConfig:
    """One MoE layer, half text and half audio experts. The rest of the model is as small as possible."""
    group = {"size": arguments.experts // 2, "moe_router_topk": arguments.top_k}
    values = {
        "vocab": {"text_vocab_size": 8, "num_codebooks": 1, "codebook_size": 8},
        "model": {
            "num_layers": 2,
            "hidden_size": arguments.hidden,
            "moe": {
                "groups": [{"modality": name, **group} for name in ("text", "audio")],
                "moe_ffn_hidden_size": arguments.ffn,
                "expert_backend": backend,
            },
        },
        "precision": {"dtype": "bf16" if platform.device().type == "cuda" else "fp32"},
    }
    return build_config("bench", values, [])


def build_experts(config: RunConfig) -> torch.nn.Module:
    groups = ProcessGroupCollection.use_mpu_process_groups()
    megatron = transformer_config(config)
    moe = config.model.moe
    spec = experts_spec(moe, ExpertGroups.from_config(moe))
    return spec(moe.num_experts, megatron, pg_collection=groups).to(platform.device())


def build_dispatcher(config: RunConfig) -> AlltoAllDispatcher:
    groups = ProcessGroupCollection.use_mpu_process_groups()
    num_experts = config.model.moe.num_experts
    return AlltoAllDispatcher(num_experts, list(range(num_experts)), transformer_config(config), groups)


@torch.no_grad()
def copy_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Copy grouped to sequential experts, on one rank."""
    places = ((pool, place) for pool in source.children() for place in range(len(pool.experts)))
    for (pool, place), expert in zip(places, target.local_experts, strict=True):
        expert.linear_fc1.weight.copy_(pool.linear_fc1[place])
        expert.linear_fc2.weight.copy_(pool.linear_fc2[place])


def separate_matrices(experts: torch.nn.Module) -> list[list[torch.Tensor]]:
    """Copies of gate ``[f, h]``, up ``[f, h]`` and down ``[h, f]`` of each expert."""
    halves = [[*expert.linear_fc1.weight.chunk(2), expert.linear_fc2.weight] for expert in experts.local_experts]
    return [[matrix.detach().clone().requires_grad_() for matrix in matrices] for matrices in halves]


def routed_tokens(arguments: argparse.Namespace, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens ``[n, h]``, their experts ``[n, k]``, uniform over their modality's half, and weights ``[n, k]``."""
    generator = torch.Generator().manual_seed(0)
    half = arguments.experts // 2
    choice = torch.rand(arguments.tokens, half, generator=generator).topk(arguments.top_k, dim=1).indices
    is_audio = torch.rand(arguments.tokens, 1, generator=generator) < 0.5
    weights = torch.rand(arguments.tokens, arguments.top_k, generator=generator) / arguments.top_k
    tokens = torch.randn(arguments.tokens, arguments.hidden, generator=generator).to(dtype)
    device = platform.device()
    return (
        tokens.to(device).requires_grad_(),
        (choice + is_audio * half).to(device),
        weights.to(device).requires_grad_(),
    )


def dispatched(
    dispatcher: AlltoAllDispatcher,
    experts: torch.nn.Module,
    tokens: torch.Tensor,
    choice: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """What a layer does after its router: sort tokens by expert, compute, sum each token's outputs."""
    empty = torch.zeros(tokens.shape[0], dispatcher.num_experts, device=tokens.device)
    routing_map = empty.bool().scatter(1, choice, True)
    probs = empty.scatter(1, choice, weights)
    sent = dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(tokens, routing_map, probs))
    rows, counts, row_probs = dispatcher.dispatch_postprocess(*sent)
    output, _ = experts(rows, counts, row_probs)
    return dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(output)))


def loop_over_masks(
    experts: list[list[torch.Tensor]], tokens: torch.Tensor, choice: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Every expert finds its rows among all n * k copies of the tokens."""
    copies = tokens.repeat_interleave(choice.shape[1], dim=0)
    flat_choice = choice.flatten()
    outputs = torch.empty_like(copies)
    for index, (gate, up, down) in enumerate(experts):
        mine = copies[flat_choice == index]
        outputs[flat_choice == index] = (torch.nn.functional.silu(mine @ gate.t()) * (mine @ up.t())) @ down.t()
    return (outputs.view(*choice.shape, -1) * weights[..., None]).sum(dim=1).to(tokens.dtype)


def make_parser() -> argparse.ArgumentParser:
    full = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="time the routed experts of one layer")
    for option, on_gpu, on_cpu in (("tokens", 16384, 2048), ("hidden", 2048, 512), ("ffn", 1408, 352)):
        parser.add_argument(f"--{option}", type=int, default=on_gpu if full else on_cpu, metavar="N")
    parser.add_argument("--experts", type=int, default=64, metavar="N", help="of both modalities (default: 64)")
    parser.add_argument("--top-k", type=int, default=6, metavar="N")
    paired.add_arguments(parser)
    return parser


if __name__ == "__main__":
    cli.run(make_parser(), bench_experts)
