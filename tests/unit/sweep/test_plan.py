"""Runs of a sweep: checked before the first starts, equal in cost by construction, known by what they compute."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_most.config import dump_config
from megatron_most.errors import ConfigError
from megatron_most.model import count_parameters
from megatron_most.planning import train_flops_per_token
from megatron_most.sweep.plan import describe_runs, plan_runs
from megatron_most.sweep.spec import Sweep, load_sweep
from tests.distributed.tiny import tiny_config

ROOT = Path(__file__).parents[3]
SPECS = sorted(path for path in (ROOT / "examples/sweeps").glob("*.yaml") if "base" not in path.name)


@pytest.fixture
def folder(tmp_path):
    config = tiny_config(data__train=f"[{{path: {tmp_path}/asr}}]", run_dir=tmp_path / "run")
    (tmp_path / "base.yaml").write_text(dump_config(config))
    (tmp_path / "asr.json").write_text("{}")
    return tmp_path


def sweep(folder: Path, text: str) -> Sweep:
    path = folder / "sweep.yaml"
    path.write_text(f"{{name: s, base: {folder}/base.yaml, output: {folder}/out, seeds: [1, 2], {text}}}")
    return load_sweep(path)


NO_SHARED = "axes: {shared: {with: {}, without: {model.moe.moe_shared_expert_intermediate_size: 0}}}"


@pytest.mark.parametrize("match", ["active_parameters", "flops"])
def test_what_is_taken_away_comes_back_as_width(folder, match):
    runs = plan_runs(sweep(folder, f"{NO_SHARED}, budget: {{match: {match}, multiple: 4, tolerance: 0.01}}"))
    base, _, narrow, _ = runs
    assert narrow.config.model.moe.moe_shared_expert_intermediate_size == 0
    assert narrow.config.model.moe.moe_ffn_hidden_size == 24 + 32 // 2  # two experts take the share of one of 32
    assert count_parameters(narrow.config)["active"] == base.active_parameters == narrow.active_parameters
    assert train_flops_per_token(narrow.config) == base.flops == narrow.flops
    assert narrow.parameters > base.parameters


def test_without_a_budget_nothing_is_widened(folder):
    runs = plan_runs(sweep(folder, NO_SHARED))
    assert runs[2].config.model.moe.moe_ffn_hidden_size == runs[0].config.model.moe.moe_ffn_hidden_size
    assert runs[2].active_parameters < runs[0].active_parameters


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("axes: {model.moe.score_rul: [all]}", "variant score_rul=all: .*: unknown key; did you mean 'score_rule'"),
        ("axes: {model.hidden_size: [32, 33]}", "variant hidden_size=33: "),
        ("axes: {optimizer.lr: [fast]}", "variant lr=fast: .* must be a number"),
        (f"{NO_SHARED}, budget: {{match: flops, multiple: 64}}", "without: .* must be within budget.tolerance"),
        (
            f"{NO_SHARED}, budget: {{match: flops, width: training.train_iters}}",
            "training.train_iters.: does not change its flops",
        ),
        ("axes: {seed: [1, 2]}", "the runs seed=1, seed 1 and seed=2, seed 1 are the same"),
        ("axes: {optimizer.lr: [1.0e-3]}, resources: {ranks: 3}", "variant lr=0.001: training.global_batch_size"),
        ("axes: {parallel.expert_model_parallel_size: [1, 4]}, resources: {ranks: 2}", "expert_model_parallel_size=4"),
    ],
)
def test_a_wrong_run_stops_all_before_anything_is_made(folder, text, match):
    with pytest.raises(ConfigError, match=match):
        plan_runs(sweep(folder, text))
    assert not (folder / "out").exists()


def test_a_run_is_known_by_what_it_computes(folder):
    text = "axes: {optimizer.lr: [1.0e-3, 2.0e-3]}"
    first = [run.identity for run in plan_runs(sweep(folder, text))]
    assert len(set(first)) == 4
    renamed = sweep(folder, "axes: {rate: {slow: {optimizer.lr: 1.0e-3}, fast: {optimizer.lr: 2.0e-3}}}")
    assert [run.identity for run in plan_runs(renamed)] == first
    patient = sweep(folder, f"{text}, overrides: {{parallel.distributed_timeout_minutes: 99}}")
    assert [run.identity for run in plan_runs(patient)] == first
    (folder / "asr.json").write_text('{"rebuilt": true}')
    assert not set(first) & {run.identity for run in plan_runs(sweep(folder, text))}


def test_runs_of_versions_that_wrote_the_normalizer_out_are_found(folder):
    def identities(normalizer):
        entry = f"{{suite: asr, data: d.jsonl{normalizer}}}"
        return [
            run.identity for run in plan_runs(sweep(folder, f"axes: {{optimizer.lr: [1.0e-3]}}, evaluation: [{entry}]"))
        ]

    assert identities("") == identities(", normalizer: whisper-english") != identities(", normalizer: basic")


def test_runs_that_were_begun_with_old_names_of_keys_are_found(folder, monkeypatch):
    text = "axes: {optimizer.lr_warmup_iters: [1, 2]}"
    first = plan_runs(sweep(folder, text))[0]
    begun = first.directory.with_name(first.directory.name.replace("lr_warmup_iters=1", "old_name=1"))
    begun.mkdir(parents=True)
    assert [run.directory == begun for run in plan_runs(sweep(folder, text))] == [True, False, False, False]
    monkeypatch.setattr("megatron_most.sweep.plan.with_old_names", lambda config: config)
    assert plan_runs(sweep(folder, text))[0].identity != first.identity


def test_the_dry_run_lists_costs_and_what_is_missing(folder):
    described = sweep(folder, f"{NO_SHARED}, budget: {{match: flops, multiple: 4}}")
    runs = plan_runs(described)
    text = describe_runs(described, runs)
    assert "4 runs" in text and "with (baseline)" in text and f"{runs[0].parameters:,}" in text
    assert "model.moe.moe_ffn_hidden_size=40" in text and "missing" not in text
    (folder / "asr.json").unlink()
    assert f"missing: {folder}/asr.json" in describe_runs(described, plan_runs(described))


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_the_sweeps_of_the_examples_are_right(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    described = load_sweep(path)
    runs = plan_runs(described)
    assert len(described.spec.seeds) >= 3 and len(runs) == len(described.variants) * len(described.spec.seeds)
    if described.spec.budget.match == "active_parameters":
        assert max(run.active_parameters for run in runs) < 1.04 * min(run.active_parameters for run in runs)


def test_there_are_sweeps_among_the_examples():
    assert len(SPECS) >= 2
