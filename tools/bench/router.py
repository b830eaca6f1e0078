#!/usr/bin/env python
"""The cost of routing by modality against Megatron's plain router, on one MoE layer and on a training step.

    python -m tools.bench.router [--tokens N] [--hidden N] [--ffn N] [--experts N] [--top-k N] [--blocks N]

All arms have the same layers, weights, experts, dispatcher and sequence balance loss on one rank; only the router
differs: Megatron's, ours, and where there is Triton, ours as a kernel. Ours also records statistics. Targets: at most
1.02 on the layer and 1.01 on the step. The router is also timed alone and, on a GPU, against a copy of the bytes that
it must read and write. Defaults are DeepSeek-V2-Lite's sizes in bf16 on a GPU, and about a quarter of them in fp32 on a
CPU.

Shape letters: n tokens, E experts, h hidden size.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter

from megatron_most import cli, parallel, platform
from megatron_most.config import RunConfig
from megatron_most.config.load import build_config
from megatron_most.moe.token_planes import pack_planes
from megatron_most.training.train_step import build_train_state, compute_gradients
from tools.bench import paired
from tools.bench.rows import half_audio

LAYERS = 4  # the first has no experts
VOCABULARY = 4096
PLAIN, AWARE, KERNEL = "plain router", "modality-aware router", "modality-aware router, Triton kernel"


class PlainRouter(TopKRouter):
    """Megatron's router over all experts, which ignores planes."""

    def forward(
        self, input: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(input)


def bench_router(arguments: argparse.Namespace) -> None:
    cli.require_positive(arguments, "tokens", "hidden", "ffn", "experts", "top_k", "blocks", "threads")
    platform.install()
    platform.set_threads(arguments.threads)
    config = model_config(arguments)
    parallel.initialize(config.parallel, config.seed)
    state = build_train_state(config)
    [model] = state.model_chunks
    layers = [layer.mlp for layer in model.decoder.layers[1:]]
    aware, plain = [layer.router for layer in layers], [plain_router(layer.router) for layer in layers]
    routers = {PLAIN: plain, AWARE: aware}
    if platform.can_run_triton():
        routers[KERNEL] = aware

    def with_router(arm: str, call: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            for layer, router in zip(layers, routers[arm], strict=True):
                layer.router = router
                if arm != PLAIN:
                    router.use_kernel(arm == KERNEL)
            call()

        return run

    batch = half_audio(config)
    planes = pack_planes(batch.modality, batch.is_padding, 2)
    dtype = next(model.parameters()).dtype
    tokens = torch.randn(arguments.tokens, 1, arguments.hidden, dtype=dtype, device=planes.device, requires_grad=True)
    gradient = torch.randn_like(tokens)

    def router_pass() -> None:
        probs, _ = layers[0].router(tokens, planes.transpose(0, 1))
        probs.backward(torch.ones_like(probs))

    def layer_pass() -> None:
        layers[0](tokens, padding_mask=planes)[0].backward(gradient)

    def training_step() -> None:
        compute_gradients(state, [batch])
        state.optimizer.step()

    print(
        f"{arguments.tokens} tokens, half of them audio, top-{arguments.top_k} of {arguments.experts} experts,"
        f" hidden {arguments.hidden}, ffn {arguments.ffn}, {dtype}, {platform.device()}"
    )
    # The step comes first: it sets the scale of balance losses in later backward passes.
    for what, call in (
        (f"training step of {LAYERS} layers", training_step),
        ("MoE layer, forward and backward", layer_pass),
        ("router, forward and backward", router_pass),
    ):
        arms = {arm: with_router(arm, call) for arm in routers}
        print(f"{what}: {paired.compare(arms, PLAIN, blocks=arguments.blocks)}")
    if planes.device.type == "cuda":  # a CPU's router is not bound by memory bandwidth
        with_router(AWARE, lambda: report_floor(arguments, layers[0].router, tokens, planes))()
    parallel.destroy()


def model_config(arguments: argparse.Namespace) -> RunConfig:
    group = {"size": arguments.experts // 2, "moe_router_topk": arguments.top_k}
    heads = max(1, arguments.hidden // 128)
    values = {
        "vocab": {"text_vocab_size": VOCABULARY, "num_codebooks": 4, "codebook_size": 1024},
        "model": {
            "num_layers": LAYERS,
            "hidden_size": arguments.hidden,
            "ffn_hidden_size": 4 * arguments.hidden,
            "attention": {"num_attention_heads": heads, "kv_lora_rank": arguments.hidden // 4},
            "moe": {
                "groups": [{"modality": name, **group} for name in ("text", "audio")],
                "moe_ffn_hidden_size": arguments.ffn,
                "moe_shared_expert_intermediate_size": 2 * arguments.ffn,
                "moe_router_load_balancing_type": "seq_aux_loss",
            },
        },
        # Layers are also timed alone, so no hook may wait for gradients of the whole model.
        "optimizer": {"overlap_grad_reduce": False},
        "data": {"seq_length": arguments.tokens, "packing": False},
        "precision": {"dtype": "bf16" if platform.device().type == "cuda" else "fp32"},
    }
    return build_config("bench", values, [])


def plain_router(router: torch.nn.Module) -> PlainRouter:
    """Megatron's router with the same weight and the same kind of balance loss."""
    config = router.config
    config.moe_router_load_balancing_type = "seq_aux_loss"
    config.moe_aux_loss_coeff = router.moe.moe_aux_loss_coeff
    plain = PlainRouter(config, ProcessGroupCollection.use_mpu_process_groups())
    plain.set_layer_number(router.layer_number)
    plain.weight = router.weight
    return plain


@torch.no_grad()
def report_floor(
    arguments: argparse.Namespace, router: torch.nn.Module, tokens: torch.Tensor, planes: torch.Tensor
) -> None:
    """Time a forward pass against a copy of the bytes that it must read and write.

    It reads the hidden states and its weight, and writes a probability (fp32) and a flag for each token and expert.
    """
    num_bytes = tokens.nbytes + router.weight.nbytes + 5 * arguments.tokens * arguments.experts
    source = torch.empty(num_bytes // 2, dtype=torch.uint8, device=tokens.device)
    target = torch.empty_like(source)
    arms = {
        "copy of the bytes": lambda: target.copy_(source),
        AWARE: lambda: router(tokens, planes.transpose(0, 1)),
    }
    print(f"router, forward, {num_bytes / 1e6:.1f} MB: {paired.compare(arms, 'copy of the bytes', arguments.blocks)}")


def make_parser() -> argparse.ArgumentParser:
    full = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="time routing by modality against Megatron's plain router")
    for option, on_gpu, on_cpu in (("tokens", 16384, 2048), ("hidden", 2048, 512), ("ffn", 1408, 352)):
        parser.add_argument(f"--{option}", type=int, default=on_gpu if full else on_cpu, metavar="N")
    parser.add_argument("--experts", type=int, default=64, metavar="N", help="of both modalities (default: 64)")
    parser.add_argument("--top-k", type=int, default=6, metavar="N")
    paired.add_arguments(parser)
    return parser


if __name__ == "__main__":
    cli.run(make_parser(), bench_router)
