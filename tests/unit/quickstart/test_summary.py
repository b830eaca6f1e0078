"""What the summaries of examples take from a run's own files."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from examples import results
from megatron_most.model import count_parameters
from tests.distributed.tiny import tiny_config


def test_training_summary_adds_up_the_intervals(tmp_path, monkeypatch):
    metrics = [
        {"step": 1, "loss": 9.0, "loss/text": 6.0, "loss/audio": 12.0, "step_seconds": 3.0, "consumed_tokens": 100},
        {"step": 10, "validation/x/loss": 5.0},
        {"step": 11, "loss": 4.0, "loss/text": 2.0, "loss/audio": 5.0, "step_seconds": 0.5, "consumed_tokens": 1100},
        {"step": 15, "loss": 3.0, "loss/text": 1.0, "loss/audio": 4.0, "step_seconds": 1.0, "consumed_tokens": 1500},
    ]
    routing = [{"step": 11, "layers": [{"outside_group": 2}, {"outside_group": 1}]}, {"step": 15, "layers": []}]
    for name, lines in (("metrics", metrics), ("routing", routing)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "environment.json").write_text(json.dumps({"versions": {"torch": "2"}}))
    config = tiny_config()
    metadata = SimpleNamespace(config={"parallel": {"expert_model_parallel_size": 2}}, world_size=2)
    monkeypatch.setattr(results, "read_metadata", lambda run_dir: metadata)

    summary = results.training_summary(tmp_path, config)

    assert summary["train_seconds"] == pytest.approx(3.0 + 10 * 0.5 + 4 * 1.0)
    assert summary["tokens_per_second"] == pytest.approx(1500 / 12)
    assert (summary["steps"], summary["tokens_outside_group"]) == (15, 3)
    assert summary["loss_first"] == {"text": 6.0, "audio": 12.0}
    assert summary["loss_last"] == {"text": 1.0, "audio": 4.0}
    assert summary["parameters_total"] == count_parameters(config)["total"]
    assert summary["layout"] == {"expert_model_parallel_size": 2, "world_size": 2}
