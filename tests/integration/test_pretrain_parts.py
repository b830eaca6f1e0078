"""Runs that train a few parts of the model: what they log, and that they go on as if they had not been disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.harness import run_ranks
from tests.integration.test_pretrain_layouts import continue_run, last_lines
from tests.integration.tiny_run import assert_same_weights, metric_lines, run_config, train

SCALES = (
    "[{part: experts.audio, scale: 1}, {part: embeddings.audio, scale: 1}, {part: heads, scale: 0.5},"
    " {part: heads.audio, scale: 1}, {part: rest, scale: 0}]"
)
EXPERT = {"parallel__expert_model_parallel_size": 2, "model__moe__expert_order": "contiguous"}


def test_frozen_parts_log_and_resume(tmp_path: Path) -> None:
    options = {"optimizer__lr_scales": SCALES, "precision__dtype": "bf16", **EXPERT}
    whole = run_config(tmp_path, "whole", **options)
    run_ranks(2, train, whole)
    lines = [line for line in metric_lines(whole) if "grad_norm" in line]
    assert [line["step"] for line in lines] == [1, 2, 4, 6]
    for line in lines:
        parts = {name for name in line if name.startswith("grad_norm/")}
        learning = ("experts.audio", "embeddings.audio", "heads", "heads.audio")
        assert parts == {f"grad_norm/{part}" for part in learning}
        assert sum(line[name] ** 2 for name in parts) == pytest.approx(line["grad_norm"] ** 2, rel=1e-5)
    plain = run_config(tmp_path, "plain", **EXPERT)
    run_ranks(2, train, plain)
    rates = {line["step"]: line["lr"] for line in metric_lines(plain) if "lr" in line}
    assert {line["step"]: line["lr"] for line in lines} == rates

    resumed = run_config(tmp_path, "resumed", **options)
    assert continue_run(whole, resumed, 2) == last_lines(whole)
    # Seven steps end otherwise than six did: both runs train the last one anew, from all that was saved.
    options["training__train_iters"] = 7
    undisturbed, disturbed = (
        run_ranks(2, train, run_config(tmp_path, name, **options)) for name in ("whole", "resumed")
    )
    assert_same_weights(undisturbed, disturbed)
