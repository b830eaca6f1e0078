"""What both sides of a comparison compute: the GPU in the test's process, the CPU in one of its own.

Everything runs on :func:`megatron_most.platform.device`, from weights and inputs that depend on names and seeds alone
and that bf16 holds exactly; results come back as fp32 tensors on the CPU.

Shape letters: n tokens, k inputs, o outputs, e experts.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_most import platform
from megatron_most.checkpointing import load_checkpoint
from megatron_most.config import PrecisionConfig, RunConfig
from megatron_most.data.loading.batch import Batch
from megatron_most.model.specs import experts_spec
from megatron_most.model.transformer_config import transformer_config
from megatron_most.moe import ExpertGroups
from megatron_most.moe.dispatcher import AlltoAllDispatcher
from megatron_most.moe.token_planes import pack_planes
from megatron_most.precision import Fp8Product
from megatron_most.training.microbatches import packed_seq_params, sum_over_ranks
from megatron_most.training.train_step import build_train_state, compute_gradients, train_step
from tests.distributed.observe import STEADY, mixed_batches
from tests.distributed.shards import assemble, fill_weights, local_pieces
from tests.distributed.tiny import tiny_config
from tests.unit.moe.routing import make_router, make_tokens

Overrides = dict[str, Any]

ALL_CHOSEN: Overrides = {
    "model__moe__groups": "[{modality: text, size: 2, moe_router_topk: 2},"
    " {modality: audio, size: 2, moe_router_topk: 2}]"
}
"""Every expert of a modality is chosen, so that no rounding of bf16 sends a token elsewhere."""
MODELS: dict[str, Overrides] = {
    "rows": {},
    "packed": {"data__packing": True, "training__micro_batch_size": 1},
    "gqa": {
        "model__attention__type": "gqa",
        "model__attention__num_query_groups": 2,
        "model__attention__kv_channels": 8,
    },
    "all chosen": ALL_CHOSEN,
    "all chosen, packed": {**ALL_CHOSEN, "data__packing": True, "training__micro_batch_size": 1},
}
LOADS = {
    "ragged": [5, 0, 33, 1, 0, 7, 64, 2],
    "empty pool": [3, 0, 8, 1, 0, 0, 0, 0],
    "last pool only": [0, 0, 0, 0, 0, 9, 0, 16],
    "nothing": [0] * 8,
}
"""Tokens of each of eight experts: those of text, then those of audio."""
RECIPES = {
    "tensorwise e4m3": ("tensorwise", "e4m3"),
    "tensorwise hybrid": ("tensorwise", "hybrid"),
    "delayed e4m3": ("delayed", "e4m3"),
    "delayed hybrid": ("delayed", "hybrid"),
    "blockwise e4m3": ("blockwise", "e4m3"),
    "mxfp8 e4m3": ("mxfp8", "e4m3"),
}
COUNTS = [64, 0, 32, 128]
"""Tokens of each expert of an FP8 product, multiples of every recipe's alignment."""
ROUTERS: dict[str, Overrides] = {
    "group": {},
    "all": {"model__moe__score_rule": "all"},
    "sigmoid, bias": {
        "model__moe__moe_router_score_function": "sigmoid",
        "model__moe__moe_router_bias_update_rate": 1e-2,
    },
    "group-limited": {
        "model__moe__groups": "[{modality: text, size: 4, moe_router_topk: 2,"
        " moe_router_num_groups: 2, moe_router_group_topk: 1},"
        " {modality: audio, size: 4, moe_router_topk: 2,"
        " moe_router_num_groups: 2, moe_router_group_topk: 1}]"
    },
}


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().cpu()


def fill_rounded(chunks: list[torch.nn.Module]) -> None:
    """Weights that depend on their names alone, rounded to bf16."""
    fill_weights(chunks)
    round_to_bf16(chunks)


@torch.no_grad()
def round_to_bf16(modules: list[torch.nn.Module]) -> None:
    for module in modules:
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())


def batches_of_step(config: RunConfig, step: int) -> list[Batch]:
    return [batch.to(platform.device()) for batch in mixed_batches(config, step)]


def logits(model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """Of the main head ``[b, s, V]`` and of the codebooks ``[b, s, C, K]``, on the host."""
    model.eval()
    with torch.no_grad():
        main, codes = model(
            batch.ids, batch.modality, batch.is_padding, codes=batch.codes, packed_seq_params=packed_seq_params(batch)
        )
    model.train()
    return {"logits": to_host(main), "codebook logits": to_host(codes)}


def gradients(chunks: list[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """By global name, from the buffers of a single rank; weights are overwritten."""
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.data = parameter.main_grad.view(parameter.shape)
    return by_name(chunks)


def by_name(chunks: list[torch.nn.Module]) -> dict[str, torch.Tensor]:
    return assemble([[(key, shape, at, to_host(view)) for key, shape, at, view in local_pieces(chunks)]])


def model_step(overrides: Overrides) -> dict[str, Any]:
    """Logits of one micro-batch, then the metric table and all gradients of a step."""
    config = tiny_config(**{"model__transformer_impl": "portable", **overrides})
    state = build_train_state(config, fill_rounded)
    batches = batches_of_step(config, 0)
    found: dict[str, Any] = logits(state.model_chunks[0], batches[0])
    found["table"] = torch.tensor(sum_over_ranks(compute_gradients(state, batches)))
    found["gradients"] = gradients(state.model_chunks)
    return found


def losses_of_steps(overrides: Overrides, num_steps: int, same_batch: bool = False) -> list[float]:
    """Mean loss of each step of training, every step on a batch of its own unless it is to be the ``same_batch``."""
    config = tiny_config(**{"model__transformer_impl": "portable", "precision__dtype": "bf16", **STEADY, **overrides})
    state = build_train_state(config, fill_rounded)
    results = [train_step(state, batches_of_step(config, 0 if same_batch else step)) for step in range(num_steps)]
    return [result.mean_losses["loss"] for result in results]


def experts(backend: str, counts: list[int], dtype: str) -> dict[str, torch.Tensor]:
    """Output, and gradients of tokens, probs and weights, of the routed experts of a layer."""
    config = tiny_config(model__transformer_impl="portable", model__moe__expert_backend=backend, precision__dtype=dtype)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    megatron = transformer_config(config)
    moe = config.model.moe
    spec = experts_spec(moe, ExpertGroups.from_config(moe))
    module = spec(moe.num_experts, megatron, pg_collection=groups)
    module.to(platform.device())
    fill_weights([module])
    round_to_bf16([module])
    generator = torch.Generator().manual_seed(3)
    shape = (sum(counts), config.model.hidden_size)
    tokens, output_gradient = (
        torch.randn(shape, generator=generator).bfloat16().to(megatron.params_dtype).to(platform.device())
        for _ in range(2)
    )
    probs = torch.rand(len(tokens), generator=generator).to(platform.device()).requires_grad_()
    output, bias = module(tokens.requires_grad_(), torch.tensor(counts), probs)
    assert bias is None
    output.backward(output_gradient)
    for parameter in module.parameters():
        assert parameter.grad is not None, "missing, not zero"
        parameter.data = parameter.grad
    inputs = {"tokens": to_host(tokens.grad), "probs": to_host(probs.grad)}
    return {"output": to_host(output), **inputs, **by_name([module])}


def fp8_operands(is_grouped: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x ``[n, k]``, weight ``[o, k]`` or ``[e, o, k]``, gradient ``[n, o]``: bf16 numbers in fp32, on the CPU."""
    generator = torch.Generator().manual_seed(5)
    inputs, outputs = 256, 384
    lead = (len(COUNTS),) if is_grouped else ()
    x = torch.randn(sum(COUNTS), inputs, generator=generator)
    x *= 2.0 ** torch.randint(-6, 6, (sum(COUNTS), 1), generator=generator)
    weight = torch.randn(*lead, outputs, inputs, generator=generator) / inputs**0.5
    gradient = torch.randn(sum(COUNTS), outputs, generator=generator) * 1e-3
    return tuple(tensor.bfloat16().float() for tensor in (x, weight, gradient))


def leave_nan_in_memory() -> None:
    """Have what is not written show: memory that kernels are given next was full of NaN."""
    sizes = [2**power for power in range(8, 24)]
    blocks = [torch.full((size,), float("nan"), device=platform.device()) for size in sizes]
    del blocks


def fp8_product(kind: type[Fp8Product], recipe: str, is_grouped: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Output and both gradients of a linear layer or of experts, one of these without tokens.

    With delayed scaling it is the second step; the first one saw twice as large numbers.
    """
    name, fp8 = RECIPES[recipe]
    backend = "emulate" if dtype == torch.float32 else "auto"
    precision = PrecisionConfig(fp8=fp8, fp8_recipe=name, fp8_backend=backend)
    product = kind(precision, len(COUNTS) if is_grouped else 1)
    device = platform.device()
    ends = torch.tensor(COUNTS).cumsum(0).int().to(device)
    for scale in (2, 1) if name == "delayed" else (1,):
        x, weight, gradient = ((tensor * scale).to(device, dtype) for tensor in fp8_operands(is_grouped))
        x, weight = x.requires_grad_(), weight.requires_grad_()
        y = product.grouped(x, weight, ends) if is_grouped else product.linear(x, weight)
        y.backward(gradient)
        if product.history is not None:
            product.history.advance(product.history.current.clone())
    return {"output": to_host(y), "input gradient": to_host(x.grad), "weight gradient": to_host(weight.grad)}


def fp8_values(recipe: str) -> dict[str, torch.Tensor]:
    """Operands of a product after quantization, by role."""
    name, fp8 = RECIPES[recipe]
    product = Fp8Product(PrecisionConfig(fp8=fp8, fp8_recipe=name, fp8_backend="emulate"))
    operands = zip(("input", "weight", "gradient"), fp8_operands(is_grouped=False), strict=True)
    return {role: to_host(product.quantized(tensor.to(platform.device()), role)) for role, tensor in operands}


def routing(overrides: Overrides, is_kernel: bool = False) -> dict[str, torch.Tensor]:
    """Routing of given fp32 logits, its statistics, and where the dispatcher puts the tokens."""
    config = tiny_config(**overrides)
    moe, device = config.model.moe, platform.device()
    router = make_router(moe).to(device)
    router.use_kernel(is_kernel)
    if router.expert_bias is not None:
        router.expert_bias.values += 0.1 * router.expert_bias._is_allowed * torch.arange(8, device=device) % 0.3
    hidden, modality, is_padding = (tensor.to(device) for tensor in make_tokens(length=64))
    generator = torch.Generator().manual_seed(9)
    scores = torch.randn(*hidden.shape[:2], moe.num_experts, generator=generator).to(device).requires_grad_()
    probs, routing_map = router.routing(scores, pack_planes(modality, is_padding, 2).transpose(0, 1))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    dispatcher = AlltoAllDispatcher(moe.num_experts, list(range(moe.num_experts)), router.config, groups)
    tokens, sorted_probs = dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(hidden, routing_map, probs))
    probs.square().sum().backward()
    return {
        "routing map": routing_map.cpu(),
        "order": dispatcher._pairs.token.cpu(),
        "tokens": to_host(tokens),
        "routed": router.statistics.routed.cpu(),
        "probs": to_host(probs),
        "sorted probs": to_host(sorted_probs),
        "statistics": router.statistics.sums.float().cpu(),
        "gradient": to_host(scores.grad),
    }


def continued(directory: str) -> dict[str, Any]:
    """Weights read from a checkpoint, and the metric table of the step after it."""
    config = tiny_config(**TRAINED)
    state = build_train_state(config)
    load_checkpoint(directory, config, state.model_chunks, state.optimizer)
    weights = by_name(state.model_chunks)
    table = sum_over_ranks(compute_gradients(state, batches_of_step(config, 1)))
    return {"weights": weights, "table": torch.tensor(table)}


TRAINED: Overrides = {"model__transformer_impl": "portable", "precision__dtype": "bf16", **STEADY, **ALL_CHOSEN}
"""Of the checkpoint that :func:`continued` reads."""

ON_CPU = {
    "model": lambda name: model_step(MODELS[name]),
    "experts": lambda: {name: experts("sequential", counts, "fp32") for name, counts in LOADS.items()},
    "fp8 products": lambda: {
        f"{recipe}, {grouped}": fp8_product(Fp8Product, recipe, grouped == "experts", torch.float32)
        for recipe in RECIPES
        for grouped in ("linear", "experts")
    },
    "fp8 values": lambda: {recipe: fp8_values(recipe) for recipe in RECIPES},
    "routing": lambda: {name: routing(overrides) for name, overrides in ROUTERS.items()},
    "continued": continued,
}
"""What the CPU is asked for: always in fp32, the weights of a checkpoint aside."""
