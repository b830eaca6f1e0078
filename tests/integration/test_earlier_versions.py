"""A run that was started with an earlier Megatron-Core goes on with this one."""

from __future__ import annotations

import json
import math
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_most.checkpointing import complete_checkpoints, find_checkpoint
from megatron_most.config import load_config
from megatron_most.errors import ConfigError
from megatron_most.report.run_files import read_run
from megatron_most.training.run_directory import check_same_run
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


def unpack(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(RUNS / "megatron_core_0.16.1.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    monkeypatch.chdir(folder)


def test_old_names_of_keys_are_read_as_the_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run was configured when the keys had other names; it is that of the same configuration today."""
    unpack(tmp_path, monkeypatch)
    config = run_config(Path("."), **SIZES)
    old = yaml.safe_load(Path("run/config.yaml").read_text(encoding="utf-8"))
    assert "train_iters" not in old["training"]

    assert load_config("run/config.yaml") == config
    assert read_run("run").config["training"]["train_iters"] == config.training.train_iters
    _, metadata = find_checkpoint("run", config)
    assert metadata.config["model"]["moe"]["moe_aux_loss_coeff"] == config.model.moe.moe_aux_loss_coeff
    check_same_run(config)
    config.model.moe.groups[0].moe_router_topk = 1
    with pytest.raises(ConfigError, match=r"model.moe.groups\[0\].moe_router_topk is 2 there, 1 in this config"):
        check_same_run(config)


def test_a_run_of_megatron_core_0_16_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoint of step 3 keeps what is no tensor in ``common.pt``; the metrics are those of its own steps to 6.

    The archive is a run of ``run_config(Path("."), **SIZES)`` on two ranks with megatron-core 0.16.1, less its last
    checkpoint. Queries and keys are rotated in another order of sums since, so the last bits differ.
    """
    unpack(tmp_path, monkeypatch)
    expected = json.loads(Path("expected.json").read_text(encoding="utf-8"))["metrics"]
    config = run_config(Path("."), **SIZES)
    [checkpoint] = complete_checkpoints(config.run_dir)[0]
    assert (checkpoint / "state" / "common.pt").exists()

    run_ranks(2, train, config)

    found = [_with_parts_of_then(line) for line in metric_lines(config)]
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def _with_parts_of_then(line: dict[str, Any]) -> dict[str, Any]:
    """Metrics when ids and codes of audio were in the parts of text ids."""
    line = dict(line)
    for part in ("embeddings", "heads"):
        if f"grad_norm/{part}" in line:
            audio = line.pop(f"grad_norm/{part}.audio", 0.0)  # not in lines of then
            line[f"grad_norm/{part}"] = math.hypot(line[f"grad_norm/{part}"], audio)
    return line
