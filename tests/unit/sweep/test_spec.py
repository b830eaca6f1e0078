"""Sweep files: axes, names, and what is wrong in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_most.errors import ConfigError
from megatron_most.sweep.spec import load_sweep

HEAD = "{name: s, base: b.yaml, output: o, seeds: [1, 2], "


def load(tmp_path: Path, text: str):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return load_sweep(path)


def test_a_grid_of_values_and_named_choices(tmp_path):
    sweep = load(
        tmp_path,
        HEAD
        + "overrides: {training.train_iters: 5}, axes: {model.moe.score_rule: [group, all],"
        + " shared: {with: {}, 'no': {model.moe.moe_shared_expert_intermediate_size: 0}}},"
        + " skip: [{model.moe.score_rule: all, shared: 'no'}], baseline: {model.moe.score_rule: all}}",
    )
    assert [variant.name for variant in sweep.variants] == [
        "score_rule=group, with",
        "score_rule=group, 'no'",
        "score_rule=all, with",
    ]
    assert sweep.variants[1].overrides == (
        "training.train_iters=5",
        "model.moe.score_rule=group",
        "model.moe.moe_shared_expert_intermediate_size=0",
    )
    assert sweep.baseline.name == "score_rule=all, with"
    assert "'" not in sweep.variants[1].slug and " " not in sweep.variants[1].slug


def test_zipped_axes(tmp_path):
    sweep = load(
        tmp_path, HEAD + "combine: zip, axes: {optimizer.lr: [1.0e-3, 2.0e-3], training.train_iters: [10, 20]}}"
    )
    assert [variant.overrides for variant in sweep.variants] == [
        ("optimizer.lr=0.001", "training.train_iters=10"),
        ("optimizer.lr=0.002", "training.train_iters=20"),
    ]


def test_lists_and_mappings_are_values(tmp_path):
    sweep = load(
        tmp_path, HEAD + "axes: {groups: {plain: {model.moe.groups: [{modality: text, size: 0}, {modality: audio}]}}}}"
    )
    assert sweep.variants[0].overrides == ("model.moe.groups=[{modality: text, size: 0}, {modality: audio}]",)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[1]", "must hold a mapping"),
        ("{", "not readable as YAML"),
        ("{name: s, base: b, output: o, axes: {a.b: [1]}}", "seeds: a value is required"),
        (HEAD + "}", "axes: a value is required"),
        (HEAD + "axis: {a.b: [1]}}", "axis: unknown key"),
        (HEAD + "axes: {a.b: []}}", "axes.a.b: must be a list of values, or map names"),
        (HEAD + "axes: {a.b: [1, 1]}}", "axes.a.b: must not repeat a value"),
        (HEAD + "axes: {a: {x: [1]}}}", "axes.a.x: must map configuration keys"),
        (HEAD + "combine: zip, axes: {a.b: [1], a.c: [1, 2]}}", "equal lengths: a.b 1, a.c 2"),
        (HEAD + "combine: product, axes: {a.b: [1]}}", "combine='product': must be one of grid, zip"),
        (HEAD + "axes: {a.b: [1]}, baseline: {a.c: 1}}", "baseline: a.c: no such axis; axes are a.b"),
        (HEAD + "axes: {a.b: [1]}, baseline: {a.b: 2}}", "baseline: a.b: no choice '2'; choices are 1"),
        (HEAD + "axes: {a.b: [1, 2], a.c: [1, 2]}, baseline: {a.b: 2}}", "must match one variant, matches 2"),
        (HEAD + "axes: {a.b: [1]}, skip: [{a.b: 1}]}", "skip: must leave a variant"),
        (HEAD + "axes: {a.b: [1]}, budget: {match: time}}", "budget.match='time': must be one of"),
        (HEAD + "axes: {a.b: [1]}, resources: {concurrent: 0}}", "resources.concurrent"),
        (HEAD + "axes: {a.b: [1]}, evaluation: [{suite: mos, data: d}]}", "evaluation.suite='mos'"),
        ("{name: s, base: b, output: o, seeds: [1, 1], axes: {a.b: [1]}}", "must not repeat a seed"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, text, match):
    with pytest.raises(ConfigError, match=match) as raised:
        load(tmp_path, text)
    assert "\n" not in str(raised.value)


def test_no_such_file(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_sweep(tmp_path / "absent.yaml")
