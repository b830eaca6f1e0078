"""Starting, killing and resuming a sweep, with jobs of the real engine that do next to nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import cloudpickle
import pytest

from megatron_most import cli
from megatron_most.config import CONFIG, dump_config
from megatron_most.errors import ConfigError
from megatron_most.sweep import execution
from megatron_most.sweep.job import FAILURE, LOG, RESULT, Job, Programs, lock
from megatron_most.sweep.plan import PlannedRun, plan_runs
from megatron_most.sweep.spec import Sweep, load_sweep
from tests.distributed.tiny import tiny_config

TRAINED = "trained.txt"
PROGRAMS = Programs([], [], [])  # LightJob needs none


@dataclass
class LightJob(Job):
    """Training of a moment. While a file ``break`` is beside the run directories it fails; ``stop`` stops it."""

    def _train(self, directory: Path, log: Path, descriptors: tuple[int, ...]) -> int:
        with open(directory / TRAINED, "a") as file:
            file.write("once\n")
        time.sleep(0.5)
        log.write_text("step 1\nerror: the data is gone\n")
        if (directory.parent / "stop").exists():
            return cli.STOPPED
        return int((directory.parent / "break").exists())

    def _unfinished(self, directory: Path) -> str:
        return ""


@pytest.fixture
def described(tmp_path, monkeypatch) -> tuple[Sweep, list[PlannedRun]]:
    """Twelve runs, three at a time."""
    monkeypatch.setattr(execution, "Job", LightJob)
    # A job's process does not find the tests by name.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    (tmp_path / "asr.json").write_text("{}")
    config = tiny_config(data__train=f"[{{path: {tmp_path}/asr}}]", run_dir=tmp_path / "run")
    (tmp_path / "base.yaml").write_text(dump_config(config))
    (tmp_path / "sweep.yaml").write_text(
        f"{{name: s, base: {tmp_path}/base.yaml, output: {tmp_path}/out, seeds: [1, 2, 3, 4],"
        " axes: {optimizer.lr: [1.0e-3, 2.0e-3, 3.0e-3]}, resources: {concurrent: 3}}"
    )
    sweep = load_sweep(tmp_path / "sweep.yaml")
    yield sweep, plan_runs(sweep)
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def finished(runs: list[PlannedRun]) -> int:
    return sum((run.directory / RESULT).is_file() for run in runs)


def test_a_sweep_that_is_killed_and_resumed_runs_each_exactly_once(described):
    sweep, runs = described
    said: list[str] = []
    process = multiprocessing.get_context("fork").Process(
        target=execution.start, args=(sweep, runs, "local", False, PROGRAMS, said.append)
    )
    process.start()
    deadline = time.monotonic() + 60
    while finished(runs) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert 4 <= finished(runs) < 12
    with pytest.raises(
        ConfigError, match=f"{sweep.spec.output}: .* of the 12 runs were started before; use --resume to continue"
    ):
        execution.start(sweep, runs, "local", False, PROGRAMS, said.append)
    execution.start(sweep, runs, "local", True, PROGRAMS, said.append)
    assert finished(runs) == 12
    # Those that went on while nobody looked are among them.
    assert [(run.directory / TRAINED).read_text() for run in runs] == ["once\n"] * 12
    assert {json.loads((run.directory / RESULT).read_text())["identity"] for run in runs} == {
        run.identity for run in runs
    }
    execution.start(sweep, runs, "local", True, PROGRAMS, said.append)
    assert said[-1] == "s: 12 of 12 runs are finished, 0 to do"


def test_a_failure_stops_no_other_run_and_is_tried_again(described):
    sweep, runs = described
    runs, said = runs[:2], []
    runs[0].directory.parent.mkdir(parents=True)
    broken = runs[0].directory.parent / "break"
    broken.touch()
    execution.start(sweep, runs, "local", False, PROGRAMS, said.append)
    assert [execution.state(run) for run in runs] == ["failed", "failed"]
    assert said[-1].endswith("failed: training ended with status 1: error: the data is gone")
    broken.unlink()
    execution.start(sweep, runs, "local", True, PROGRAMS, said.append)
    assert [execution.state(run) for run in runs] == ["finished", "finished"]
    assert json.loads((runs[0].directory / RESULT).read_text())["attempts"] == 2
    assert not (runs[0].directory / FAILURE).exists()


def test_a_run_that_was_asked_to_stop_has_not_failed_and_goes_on(described):
    sweep, runs = described
    runs, said = runs[:2], []
    runs[0].directory.parent.mkdir(parents=True)
    stop = runs[0].directory.parent / "stop"
    stop.touch()
    execution.start(sweep, runs, "local", False, PROGRAMS, said.append)
    assert [execution.state(run) for run in runs] == ["stopped", "stopped"]
    assert said[-1].endswith(": stopped and saved; use --resume to continue")
    stop.unlink()
    execution.start(sweep, runs, "local", True, PROGRAMS, said.append)
    assert [execution.state(run) for run in runs] == ["finished", "finished"]


def test_a_run_that_ends_with_the_sweep_that_had_started_it_is_started_again(described):
    """Its job was killed; its training holds the lock until it has saved."""
    sweep, runs = described
    [run], said = runs[:1], []
    run.directory.mkdir(parents=True)
    (run.directory / CONFIG).write_text(dump_config(run.config))
    (run.directory / LOG).write_text("step 1\n")
    with lock(run.directory) as held:
        training = subprocess.Popen(["sleep", "1"], pass_fds=[held.fileno()])
    assert execution.state(run) == "running"
    execution.start(sweep, [run], "local", True, PROGRAMS, said.append)
    assert training.wait() == 0
    assert execution.state(run) == "finished" and not (run.directory / FAILURE).exists()


def test_missing_data_stops_all_before_anything_is_made(described):
    sweep, _ = described
    (sweep.path.parent / "asr.json").unlink()
    with pytest.raises(ConfigError, match="sweep.yaml: no such files: .*asr.json"):
        execution.start(sweep, plan_runs(sweep), "local", False, PROGRAMS, print)
    assert not Path(sweep.spec.output).exists()


def test_slurm_is_missed_in_one_line(described, monkeypatch, tmp_path):
    sweep, runs = described
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="--executor=slurm: ") as raised:
        execution.start(sweep, runs, "slurm", False, PROGRAMS, print)
    assert "\n" not in str(raised.value)


def test_jobs_are_unpickled_only_from_a_folder_that_nobody_else_can_write(tmp_path, monkeypatch):
    folder = tmp_path / "out" / "jobs"
    assert execution._own_folder(folder) == folder and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    execution._own_folder(folder)
    assert folder.stat().st_mode & 0o777 == 0o755
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(
        ConfigError, match=rf"jobs: belongs to user {folder.stat().st_uid}, who could make its jobs run anything"
    ):
        execution._own_folder(folder)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be made"):
        execution._own_folder(tmp_path / "file" / "jobs")
