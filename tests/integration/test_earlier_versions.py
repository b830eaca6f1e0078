"""A run that was started with an earlier Megatron-Core goes on with this one."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from megatron_most.checkpointing import complete_checkpoints
from tests.distributed.harness import run_ranks
from tests.integration.tiny_run import metric_lines, run_config, train

RUNS = Path(__file__).parent / "runs_of_earlier_versions"
SIZES = {
    "parallel__expert_model_parallel_size": 2,
    "model__num_layers": 2,
    "model__hidden_size": 16,
    "model__ffn_hidden_size": 16,
    "model__moe__moe_ffn_hidden_size": 8,
    "model__moe__moe_shared_expert_intermediate_size": 8,
}


def test_a_run_of_megatron_core_0_16_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoint of step 3 keeps what is no tensor in ``common.pt``; the metrics are those of its own steps to 6.

    The archive is a run of ``run_config(Path("."), **SIZES)`` on two ranks with megatron-core 0.16.1, less its last
    checkpoint. Where the processor is the same, weights and metrics are equal bit for bit.
    """
    with tarfile.open(RUNS / "megatron_core_0.16.1.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    expected = json.loads(Path("expected.json").read_text(encoding="utf-8"))["metrics"]
    config = run_config(Path("."), **SIZES)
    [checkpoint] = complete_checkpoints(config.run_dir)[0]
    assert (checkpoint / "state" / "common.pt").exists()

    run_ranks(2, train, config)

    found = metric_lines(config)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
