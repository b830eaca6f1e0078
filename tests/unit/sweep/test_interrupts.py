"""Ctrl-C in a sweep, a sweep that is killed, and the jobs that either leaves."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cloudpickle
import pytest

from megatron_most.config import dump_config
from megatron_most.sweep import execution
from megatron_most.sweep.job import FAILURE, RESULT, Job, Programs
from megatron_most.sweep.plan import PlannedRun, plan_runs
from megatron_most.sweep.spec import Sweep, load_sweep
from tests.distributed.tiny import tiny_config

PROGRAMS = Programs([], [], [])  # SlowJob needs none


@dataclass
class SlowJob(Job):
    """Training that lasts until it is asked to stop, or as long as there is a file ``slow`` beside the sweep's."""

    def _train(self, directory: Path, log: Path, descriptors: tuple[int, ...]) -> int:
        log.write_text("step 1\n")
        while (directory.parents[2] / "slow").exists() and not self.is_stopped:
            time.sleep(0.05)
        return 0

    def _unfinished(self, directory: Path) -> str:
        return ""


@pytest.fixture
def described(tmp_path, monkeypatch) -> Iterator[tuple[Sweep, list[PlannedRun]]]:
    """Three runs, two at a time."""
    monkeypatch.setattr(execution, "Job", SlowJob)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a job's process does not find the tests by name
    (tmp_path / "slow").touch()
    (tmp_path / "asr.json").write_text("{}")
    config = tiny_config(data__train=f"[{{path: {tmp_path}/asr}}]", run_dir=tmp_path / "run")
    (tmp_path / "base.yaml").write_text(dump_config(config))
    (tmp_path / "sweep.yaml").write_text(
        f"{{name: s, base: {tmp_path}/base.yaml, output: {tmp_path}/out, seeds: [1, 2, 3],"
        " axes: {optimizer.lr: [1.0e-3]}, resources: {concurrent: 2}}"
    )
    sweep = load_sweep(tmp_path / "sweep.yaml")
    yield sweep, plan_runs(sweep)
    (tmp_path / "slow").unlink(missing_ok=True)  # ends jobs that a failed test has left
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def start(described, tmp_path) -> Iterator[Callable[[bool], multiprocessing.Process]]:
    """Starts the sweep in a process group, as a terminal does; what all its processes say goes to ``said.txt``."""
    sweep, runs = described
    started = []

    def in_group(resume: bool) -> None:
        os.setpgid(0, 0)
        said = os.open(tmp_path / "said.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(said, 2)
        execution.start(sweep, runs, "local", resume, PROGRAMS, lambda line: os.write(said, f"{line}\n".encode()))

    def start(resume: bool) -> multiprocessing.Process:
        process = multiprocessing.get_context("fork").Process(target=in_group, args=(resume,))
        process.start()
        started.append(process)
        deadline = time.monotonic() + 120
        while len(running(runs)) < 2:
            assert time.monotonic() < deadline and process.is_alive()
            time.sleep(0.05)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def running(runs: list[PlannedRun]) -> list[PlannedRun]:
    return [run for run in runs if execution.state(run) == "running"]


def interrupt(process: multiprocessing.Process) -> None:
    time.sleep(1)  # so that a sweep that goes on has seen its jobs
    os.killpg(process.pid, signal.SIGINT)
    process.join(120)
    assert process.exitcode == 130


def test_ctrl_c_lets_jobs_stop_and_is_one_line(described, start, tmp_path):
    sweep, runs = described
    interrupt(start(False))
    assert not running(runs) and not list((tmp_path / "out").rglob(FAILURE))
    told, *rest = (tmp_path / "said.txt").read_text().splitlines()
    assert told == "s: 0 of 3 runs are finished, 3 to do"
    assert rest == ["interrupted: 2 runs save and stop (Ctrl-C again: do not wait); use --resume to continue"]
    (tmp_path / "slow").unlink()
    execution.start(sweep, runs, "local", True, PROGRAMS, print)
    assert all((run.directory / RESULT).is_file() for run in runs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_jobs_outlive_a_killed_sweep_and_the_next_one_can_stop_them(described, start, number):
    _, runs = described
    process = start(False)
    os.killpg(process.pid, number) if number == signal.SIGHUP else process.terminate()  # SIGHUP: the terminal is closed
    process.join(120)
    assert process.exitcode == -number
    time.sleep(0.5)
    assert len(running(runs)) == 2
    interrupt(start(True))
    assert not running(runs)
