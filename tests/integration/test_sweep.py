"""Sweeps of real training: killed and resumed on this machine, and as jobs of a SLURM cluster."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_most.config import dump_config
from tests.integration.launching import ROOT, environment, started, wait_for
from tests.integration.slurm_cluster import Cluster
from tests.integration.tiny_run import run_config

COMMAND = [sys.executable, str(ROOT / "tools" / "sweep.py"), "--spec"]


def write_spec(folder: Path, seeds: list[int], resources: str, **overrides: object) -> Path:
    """Three variants of a run of six steps."""
    (folder / "base.yaml").write_text(dump_config(run_config(folder, **overrides)))
    path = folder / "sweep.yaml"
    path.write_text(
        f"{{name: tiny, base: {folder}/base.yaml, output: {folder}/out, seeds: {seeds}, resources: {resources},"
        " axes: {routing: {modality-aware: {}, plain: {model.moe.balance_scope: pooled}},"
        " shared: {with: {}, without: {model.moe.moe_shared_expert_intermediate_size: 0}}},"
        " skip: [{routing: plain, shared: without}], budget: {match: active_parameters, multiple: 4}}"
    )
    return path


def sweep(spec: Path, *options: str, **settings: str) -> str:
    done = subprocess.run(
        [*COMMAND, str(spec), *options], env=environment(**settings), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "out" / "results.csv").read_text().splitlines()))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twelve_runs_killed_in_the_middle_and_resumed_run_each_exactly_once(tmp_path: Path) -> None:
    spec = write_spec(tmp_path, [1, 2, 3, 4], "{concurrent: 2}")
    assert "12 runs" in sweep(spec, "--dry-run") and not (tmp_path / "out").exists()
    with started([*COMMAND, str(spec)], env=environment(), cwd=ROOT) as process:
        wait_for("three results", lambda: len(list(tmp_path.glob("out/runs/*/sweep_result.json"))) >= 3, 300)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert len(list(tmp_path.glob("out/runs/*/sweep_result.json"))) < 12
        sweep(spec, "--resume")
    found = rows(tmp_path)
    assert [row["state"] for row in found] == ["finished"] * 12 and all(float(row["loss"]) > 0 for row in found)
    for row in found:
        run = Path(row["run_dir"])
        assert json.loads((run / "sweep_result.json").read_text())["attempts"] == 1
        assert (run / "sweep.log").read_text().count("finished 6 steps") == 1
        steps = [line["step"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]
        assert steps == sorted(steps) and steps[-1] == 6
    # Seeds differ, and so do variants.
    assert len({row["loss"] for row in found}) == 12
    assert len({row["active_parameters"] for row in found}) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_slurm_runs_each_on_two_nodes_and_a_second_call_collects(cluster: Cluster, tmp_path: Path) -> None:
    layout = {"parallel__expert_model_parallel_size": 2}
    spec = write_spec(tmp_path, [1], "{nodes: 2, ranks: 1, concurrent: 1, minutes: 5, partition: main}", **layout)
    settings = {key: cluster.environment[key] for key in ("SLURM_CONF", "PATH")}
    assert "submitted 3 runs" in sweep(spec, "--executor", "slurm", **settings)
    assert [row["state"] for row in rows(tmp_path)] != ["finished"] * 3
    assert "3 runs are already in the queue" in sweep(spec, "--executor", "slurm", "--resume", **settings)
    wait_for("three results", lambda: len(list(tmp_path.glob("out/runs/*/sweep_result.json"))) == 3, 300)
    sweep(spec, "--executor", "slurm", "--resume", **settings)
    found = rows(tmp_path)
    assert [row["state"] for row in found] == ["finished"] * 3
    # A run that has failed and left the queue is submitted again.
    result = Path(found[1]["run_dir"]) / "sweep_result.json"
    result.rename(result.with_name("sweep_failure.json"))
    wait_for("an empty queue", lambda: not cluster.run("squeue", "--noheader"))
    assert "submitted 1 runs" in sweep(spec, "--executor", "slurm", "--resume", **settings)
    wait_for("its end", lambda: not cluster.run("squeue", "--noheader"))
    assert result.exists()
    assert json.loads((Path(found[0]["run_dir"]) / "environment.json").read_text())["world_size"] == 2
