"""Every benchmark runs, in small and on a CPU: no number means anything, but what has changed under it is seen here.

``gpu_layer`` and ``launches`` have tests of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from megatron_most import parallel
from megatron_most.config import dump_config
from tests.integration.tiny_run import run_config
from tools.bench import experts, loader, paired, profile_step, router, routing_statistics, tokenize_audio

FEW = ["--blocks", "2"]
LAYER = ["--tokens", "64", "--hidden", "128", "--ffn", "32", "--experts", "8", "--top-k", "2", *FEW]
FILES = ["--files", "2", "--shortest", "0.3", "--longest", "0.5", *FEW]
BENCHES: dict[str, tuple[ModuleType, str, list[str], list[str]]] = {
    "experts": (experts, "bench_experts", LAYER, ["64 tokens x top-2 of 8 experts", "loop over masks", "TFLOP/s"]),
    "router": (router, "bench_router", LAYER, ["training step of 4 layers", "router, forward and backward", "Triton"]),
    "routing_statistics": (routing_statistics, "measure", FEW, ["counting in all MoE layers: "]),
    "loader": (
        loader,
        "bench_loader",
        ["--documents", "60", *FEW],
        ["layout flat", "layout frame", "of megatron's positions per second"],
    ),
}


@pytest.fixture(autouse=True)
def small_and_few(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    whole = paired.compare

    def compare(arms, baseline, blocks, seconds_per_sample=0.0, warm_up=1):
        return whole(arms, baseline, blocks, seconds_per_sample=0.0, warm_up=1)

    monkeypatch.setattr(paired, "compare", compare)
    small = {**routing_statistics.MODEL["model"], "hidden_size": 64, "ffn_hidden_size": 64}
    monkeypatch.setattr(routing_statistics, "LENGTH", 64)
    monkeypatch.setitem(routing_statistics.MODEL, "model", small)
    monkeypatch.setitem(routing_statistics.MODEL, "data", {"seq_length": 64, "packing": False})
    yield
    parallel.destroy()


@pytest.mark.parametrize("name", BENCHES)
def test_it_measures_and_reports(name: str, capsys: pytest.CaptureFixture) -> None:
    bench, function, options, printed = BENCHES[name]
    getattr(bench, function)(bench.make_parser().parse_args(options))
    report = capsys.readouterr().out
    assert all(part in report for part in printed), report


def test_a_step_is_profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(run_config(tmp_path)), encoding="utf-8")
    monkeypatch.setattr(profile_step, "WARM_UP_STEPS", 1)
    monkeypatch.setattr(profile_step, "STEPS", 1)
    profile_step.profile_step(profile_step.make_parser().parse_args(["--config", str(path)]))
    assert "matrix products" in capsys.readouterr().out


@pytest.mark.slow
def test_audio_is_tokenized(capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("nemo")
    tokenize_audio.bench_tokenization(tokenize_audio.make_parser().parse_args(FILES))
    assert "the whole machine" in capsys.readouterr().out
