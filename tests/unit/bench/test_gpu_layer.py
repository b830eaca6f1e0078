"""The GPU benchmark in small, on the CPU: everything is computed and reported, no number of it means anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_most import platform
from megatron_most.config import RunConfig, load_config
from megatron_most.errors import ConfigError
from megatron_most.planning import GPUS, memory_of_rank, train_flops_per_token
from tests.distributed.tiny import WIDE, tiny_config
from tools.bench import gpu_layer, timing
from tools.bench.rows import half_audio, packed_documents

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARM_UP", 1)


def small_config() -> RunConfig:
    one_row = {"training__micro_batch_size": 1, "training__global_batch_size": 1}
    return tiny_config(**WIDE, **one_row, model__num_layers=2, precision__fp8_backend="emulate")


def test_every_table_is_there_and_full() -> None:
    report = gpu_layer.measure(small_config(), ["emulate"], loads=(3, 16), calls=2, matmul_size=32)
    head, rates, *_ = report.splitlines()
    assert "torch" in head and "driver" in head and "Transformer Engine" in head
    assert rates.startswith("bf16 product of 32 x 32")
    rows = [line.split(" | ") for line in report.splitlines() if line.startswith("| ")]
    steps, experts = rows[1:3], rows[4:]
    assert [row[:3] for row in steps] == [["| 2", "32", "one document"], ["| 2", "32", "4 documents"]]
    assert [(row[0], row[1], row[2]) for row in experts] == [
        (f"| {load}", backend, precision)
        for load in (3, 16)
        for backend, precision in (("torch", "fp32"), ("emulate", "FP8 tensorwise e4m3"))
    ]
    assert experts[0][-1] == "1.00 |"


def test_rates_are_those_of_the_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config()
    monkeypatch.setattr(gpu_layer, "training_step", lambda *_: (timing.Timing(0.5, 0.4, 0.6, 2), 3 * 2**30))
    flops = train_flops_per_token(config, gpu_layer.contents(config, half_audio(config)))
    rows = gpu_layer.training_table(config, calls=2, ceiling=64 * flops * 2)[-2:]
    cells = rows[0].split(" | ")
    assert cells[3] == "500.000 ms (IQR 400.000 to 600.000, 2 recompilations)"
    assert cells[4] == "64" and cells[6] == "50.0%" and cells[7] == "3.0"
    # Attention inside documents and heads at targets alone are less work in the same time.
    assert 0 < float(rows[1].split(" | ")[6].rstrip("%")) < 50


def test_what_a_batch_holds_is_counted() -> None:
    config = small_config()
    batch = packed_documents(config, 4)
    packed, whole = gpu_layer.contents(config, batch), gpu_layer.contents(config, half_audio(config))
    seen = sum(sum(range(1, length + 1)) for length in batch.cu_seqlens.diff().tolist())
    assert packed.attended == seen / 32 < whole.attended == 33 / 2
    assert packed.targets == batch.loss_mask.sum().item() / 32 < whole.targets == 1
    assert 0 < packed.frame_targets <= packed.targets
    assert sum(packed.modalities.values()) == pytest.approx(1)


def test_compilations_during_timed_calls_are_counted() -> None:
    functions = iter([lambda x: x + 1, lambda x: x + 2, lambda x: x * 3, lambda x: x - 4])
    x = torch.ones(2)
    with torch.compiler.set_stance("default"):
        found = timing.time_calls(lambda: torch.compile(next(functions), backend="eager")(x), calls=3)
    assert found.recompilations == 3
    assert timing.time_calls(lambda: x + 1, calls=3).recompilations == 0


def test_the_recipe_fits_one_gpu() -> None:
    """Its widths stay: what is timed is DeepSeek-V2-Lite's layer."""
    config = load_config(ROOT / gpu_layer.RECIPE, ["model.num_layers=3", *gpu_layer.ONE_GPU])
    assert (config.model.hidden_size, config.data.seq_length, config.training.micro_batch_size) == (2048, 4096, 1)
    assert memory_of_rank(config, world_size=1, pipeline_rank=0, expert_rank=0).total < GPUS["h100"].usable
    arms = gpu_layer.expert_arms(config, ["torch", "transformer_engine"])
    assert [arm.precision.fp8 for arm in arms.values()] == ["off", "off", "e4m3", "hybrid", "hybrid", "hybrid"]
    assert all(arm.model.moe.num_experts == gpu_layer.EXPERTS for arm in arms.values())


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "device", lambda: torch.device("cpu"))
    with pytest.raises(ConfigError, match="gpu_layer.py: needs a CUDA device"):
        gpu_layer.bench_gpu_layer(gpu_layer.make_parser().parse_args([]))
