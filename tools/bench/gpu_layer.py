"""A few layers at full width on one GPU: tokens/s, TFLOP/s, memory, and experts in FP8 against bf16.

    python -m tools.bench.gpu_layer [--layers N] [--calls N] [--config FILE] [key=value ...]

First, a training step of the first N layers of a recipe on one row, half of it audio: one document with a target at
every position, and packed documents as in training. Second, the experts that a rank holds at an expert parallelism of
8, at several loads, in bf16 and in FP8 by every available backend. Rates are also given as shares of a bf16 matrix
product measured in the same run. Prints Markdown for docs/performance.md.

Shape letters: n tokens of an expert, e experts, f width of an expert, h hidden size.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import gc
from collections.abc import Callable, Iterator, Sequence

import torch
from megatron.core import fp8_utils

from megatron_most import cli, parallel, platform
from megatron_most.config import RunConfig, load_config
from megatron_most.data.loading.batch import Batch
from megatron_most.errors import ConfigError
from megatron_most.model.transformer_config import transformer_config
from megatron_most.planning import RowContents, memory_of_rank, train_flops_per_token
from megatron_most.precision import fp8_product
from megatron_most.training.microbatches import stage
from megatron_most.training.run_directory import device_name, versions
from megatron_most.training.train_step import build_train_state, train_step
from tools.bench.experts import build_experts
from tools.bench.rows import half_audio, packed_documents
from tools.bench.timing import Timing, matmul_rate, time_calls

RECIPE = "examples/configs/most_16b_stage1.yaml"
ONE_GPU = (
    "parallel.expert_model_parallel_size=1",
    "training.global_batch_size=1",
    "data.seq_length=4096",  # of the measurements in docs/performance.md
)
LOADS = (64, 384, 1536, 3072, 6144)
"""Tokens per expert. 384: 4096 tokens, top-6 of 64 experts; 3072: eight such ranks."""
DOCUMENTS = 16
"""Documents of a packed row; fewer if the row is short."""
EXPERTS = 8
MATMUL = 8192
ARMS = {
    "torch": (("tensorwise", "e4m3"), ("tensorwise", "hybrid")),
    "transformer_engine": (("tensorwise", "hybrid"), ("delayed", "hybrid")),
    "emulate": (("tensorwise", "e4m3"),),
}
"""FP8 backend -> recipes and formats that are timed."""


def bench_gpu_layer(arguments: argparse.Namespace) -> None:
    cli.require_positive(arguments, "layers", "calls")
    if platform.device().type != "cuda":
        raise ConfigError("tools/bench/gpu_layer.py: needs a CUDA device, found none")
    overrides = [f"model.num_layers={arguments.layers}", *ONE_GPU, *arguments.overrides]
    backends = ["torch"] if platform.has_grouped_fp8() else []
    if platform.has_fp8() and platform.has_library("Transformer Engine"):
        backends.append("transformer_engine")
    config = load_config(arguments.config, overrides)
    print(measure(config, backends, LOADS, arguments.calls, MATMUL))


def measure(config: RunConfig, fp8_backends: Sequence[str], loads: Sequence[int], calls: int, matmul_size: int) -> str:
    """Measure everything on this process's device.

    Args:
        fp8_backends: available keys of :data:`ARMS`.
        loads: tokens of each of the :data:`EXPERTS` experts.
        calls: timed calls for each number.
        matmul_size: size of the square matrices whose product is the ceiling.

    Returns:
        The report, in Markdown.
    """
    platform.install()
    parallel.initialize(config.parallel, config.seed)
    ceiling = matmul_rate(matmul_size, torch.bfloat16, calls)
    lines = [
        f"{datetime.date.today()}, {device_name(platform.device())}, driver {platform.driver_version()}, torch"
        f" {torch.__version__} (CUDA {torch.version.cuda}), Transformer Engine"
        f" {versions().get('transformer-engine', 'not installed')}.",
        f"bf16 product of {matmul_size} x {matmul_size}: {ceiling / 1e12:.1f} TFLOP/s.",
        "",
        *training_table(config, calls, ceiling),
        "",
        *experts_table(config, fp8_backends, loads, calls, ceiling),
    ]
    parallel.destroy()
    return "\n".join(lines)


def training_table(config: RunConfig, calls: int, ceiling: float) -> list[str]:
    """Forward, backward and update."""
    lines = [
        "| layers | positions | row | step | tokens/s | TFLOP/s | share of the product | peak memory, GiB"
        " | estimate, GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = {"one document": half_audio(config)}
    count = min(DOCUMENTS, config.data.seq_length // 8)
    rows[f"{count} documents"] = packed_documents(config, count)
    for name, batch in rows.items():
        with _memory_freed():
            timing, peak = training_step(config, batch, calls)
        rate = config.data.seq_length / timing.median
        row = contents(config, batch)
        flops = rate * train_flops_per_token(config, row)
        estimate = memory_of_rank(config, world_size=1, pipeline_rank=0, expert_rank=0, rows=row).total
        measured = f"{peak / 2**30:.1f}" if peak else ""
        lines.append(
            f"| {config.model.num_layers} | {config.data.seq_length} | {name} | {timing} | {rate:.0f}"
            f" | {flops / 1e12:.1f} | {flops / ceiling:.1%} | {measured} | {estimate / 2**30:.1f} |"
        )
    return lines


def contents(config: RunConfig, batch: Batch) -> RowContents:
    """What the planner's formulas count of a batch of one row."""
    lengths = [config.data.seq_length] if batch.cu_seqlens is None else batch.cu_seqlens.diff().tolist()
    positions, targets = batch.ids.numel(), batch.targets()
    counts = batch.modality.flatten().bincount(minlength=len(config.vocab.modality_names)).tolist()
    return RowContents(
        {name: count / positions for name, count in zip(config.vocab.modality_names, counts, strict=True)},
        targets=len(targets.index) / positions,
        frame_targets=0.0 if targets.code_index is None else len(targets.code_index) / positions,
        attended=sum(length * (length + 1) / 2 for length in lengths) / positions,
        source="of the batch",
    )


def training_step(config: RunConfig, batch: Batch, calls: int) -> tuple[Timing, int]:
    """Time of a step, and the peak bytes of tensors on the device (0 on a CPU)."""
    state, staged = build_train_state(config), stage(batch, platform.device())

    def step() -> None:
        train_step(state, [staged])

    is_cuda = platform.device().type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    timing = time_calls(step, calls)
    return timing, torch.cuda.max_memory_allocated() if is_cuda else 0


def experts_table(
    config: RunConfig, fp8_backends: Sequence[str], loads: Sequence[int], calls: int, ceiling: float
) -> list[str]:
    """Forward and backward of the experts alone, every arm at every load."""
    lines = [
        "| tokens per expert | backend | precision | forward and backward | TFLOP/s | share of the product"
        " | speed over the first |",
        "|---|---|---|---|---|---|---|",
    ]
    arms = expert_arms(config, fp8_backends)
    # Three h x f matrices for each token, two operations per element; the backward pass takes twice the forward's.
    per_token = 3 * 2 * 3 * config.model.hidden_size * config.model.moe.moe_ffn_hidden_size
    for load in loads:
        baseline: Timing | None = None
        for (backend, precision), arm in arms.items():
            with _memory_freed():
                timing = time_calls(expert_pass(arm, load), calls)
            baseline = baseline or timing
            flops = per_token * load * EXPERTS / timing.median
            lines.append(
                f"| {load} | {backend} | {precision} | {timing} | {flops / 1e12:.1f} | {flops / ceiling:.1%}"
                f" | {baseline.median / timing.median:.2f} |"
            )
    return lines


def expert_arms(config: RunConfig, fp8_backends: Sequence[str]) -> dict[tuple[str, str], RunConfig]:
    """(backend, precision) -> configuration. The first, torch in bf16, is the baseline."""
    moe = config.model.moe
    groups = [
        dataclasses.replace(moe.groups[0], size=EXPERTS // 2, moe_router_topk=1, modality=g.modality)
        for g in moe.groups
    ]

    def arm(is_engine: bool, **fp8: object) -> RunConfig:
        experts = dataclasses.replace(
            moe, groups=groups, expert_backend="transformer_engine" if is_engine else "grouped"
        )
        backend = "transformer_engine" if is_engine else "portable"
        precision = dataclasses.replace(
            config.precision, **{"fp8": "off", "num_layers_at_start_in_bf16": 0, "num_layers_at_end_in_bf16": 0, **fp8}
        )
        model = dataclasses.replace(config.model, transformer_impl=backend, moe=experts)
        return dataclasses.replace(config, model=model, precision=precision)

    arms = {("torch", config.precision.dtype): arm(False)}
    if "transformer_engine" in fp8_backends:
        arms["transformer_engine", config.precision.dtype] = arm(True)
    for backend in fp8_backends:
        for recipe, fp8 in ARMS[backend]:
            arms[backend, f"FP8 {recipe} {fp8}"] = arm(
                backend == "transformer_engine", fp8=fp8, fp8_recipe=recipe, fp8_backend=backend
            )
    return arms


def expert_pass(config: RunConfig, load: int) -> Callable[[], None]:
    """Forward and backward of :data:`EXPERTS` experts with ``load`` tokens each."""
    experts = build_experts(config)
    megatron = transformer_config(config)
    is_engine = config.model.transformer_impl == "transformer_engine"
    if config.precision.uses_fp8 and not is_engine:
        for pool in experts.children():
            pool.fp8 = {name: fp8_product(config, len(pool.experts)) for name in pool.fp8}
    generator = torch.Generator().manual_seed(0)
    shape = (load * EXPERTS, config.model.hidden_size)
    tokens = torch.randn(shape, generator=generator).to(platform.device(), megatron.params_dtype).requires_grad_()
    probs = torch.rand(len(tokens), generator=generator).to(platform.device()).requires_grad_()
    counts = torch.full((EXPERTS,), load)
    gradient = torch.randn_like(tokens)

    def call() -> None:
        experts.set_is_first_microbatch()  # Transformer Engine quantizes the weights, as in every step
        with fp8_utils.get_fp8_context(megatron) if is_engine else contextlib.nullcontext():
            output, _ = experts(tokens, counts, probs)
        output.backward(gradient)
        for tensor in (tokens, probs, *experts.parameters()):
            tensor.grad = None

    return call


@contextlib.contextmanager
def _memory_freed() -> Iterator[None]:
    """Free the device memory of objects that were built in the block and are no longer referenced."""
    yield
    gc.collect()
    if platform.device().type == "cuda":
        torch.cuda.empty_cache()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="time a few layers and FP8 experts on one GPU")
    parser.add_argument("--config", default=RECIPE, metavar="FILE", help="recipe (default %(default)s)")
    parser.add_argument("--layers", type=int, default=3, metavar="N", help="the first has no experts (default 3)")
    parser.add_argument("--calls", type=int, default=30, metavar="N", help="timed calls (default %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of the configuration")
    return parser


if __name__ == "__main__":
    cli.run(make_parser(), bench_gpu_layer)
