"""Faults drawn at random for an hour: every run ends with the weights of one that met none, and leaves nothing behind.

``MOST_SOAK_MINUTES`` is how long new runs are begun, and ``MOST_SOAK_SEED`` which faults are drawn.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_most.checkpointing import complete_checkpoints, read_metadata
from megatron_most.checkpointing import directory as directories
from megatron_most.cli import STOPPED
from megatron_most.config import RunConfig, dump_config
from tests.integration.launching import ROOT, environment, started, steps_logged, wait_for
from tests.integration.tiny_run import metric_lines, run_config
from tests.unit.evaluation.stubs import write_tokenizer

MINUTES, SEED = float(os.environ.get("MOST_SOAK_MINUTES", "60")), int(os.environ.get("MOST_SOAK_SEED", "0"))
STEPS = 600
MARK = "MOST_SOAK"
"""A variable of the environment that all processes of this test inherit."""


def soak_config(directory: Path, name: str) -> RunConfig:
    """A run of two ranks that saves while it trains, and validates."""
    if not (directory / "tokenizer").exists():
        write_tokenizer(directory / "tokenizer")
        (directory / "text.txt").write_text("the fox sees the dog and the dog sees the fox.\n" * 20)
    config = run_config(
        directory,
        name,
        tokenizer=directory / "tokenizer",
        parallel__expert_model_parallel_size=2,
        parallel__distributed_timeout_minutes=1,
        training__train_iters=STEPS,
        training__eval_interval=25,
        checkpoint__save_interval=10,
        checkpoint__keep_last=3,
        logging__log_interval=1,
    )
    (directory / f"{name}.yaml").write_text(dump_config(config), encoding="utf-8")
    return config


@dataclasses.dataclass(frozen=True)
class Running:
    """A training run under way: its launcher, which leads a process group, and its ranks."""

    config: RunConfig
    launcher: subprocess.Popen[bytes]

    @property
    def ranks(self) -> list[int]:
        found = Path(f"/proc/{self.launcher.pid}/task/{self.launcher.pid}/children").read_text()
        return [child for child in map(int, found.split()) if b"megatron_most" in command_line(child)]


def command_line(process: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_bytes()
    return b""


@contextlib.contextmanager
def training(config: RunConfig, directory: Path) -> Iterator[Running]:
    name = Path(config.run_dir).name
    arguments = ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "megatron_most.commands.train"]
    command = [sys.executable, "-m", "megatron_most.commands", *arguments, "--config", str(directory / f"{name}.yaml")]
    settings = {MARK: str(directory), "TMPDIR": str(directory / "tmp")}
    try:
        with (
            open(directory / f"{name}.log", "wb") as log,
            started(command, cwd=ROOT, env=environment(**settings), stdout=log, stderr=subprocess.STDOUT) as launcher,
        ):
            yield Running(config, launcher)
    except BaseException:
        for process in processes_left(directory):  # ranks have sessions of their own
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        raise


# While it runs. Each gives the statuses with which the launcher may end; none: the run goes on.


def ask(*signals: signal.Signals) -> Callable[[Running, random.Random], set[int]]:
    def fault(run: Running, draw: random.Random) -> set[int]:
        for number in signals:
            os.killpg(run.launcher.pid, number) if number == signal.SIGINT else run.launcher.send_signal(number)
            time.sleep(draw.uniform(0, 0.5))
        return {STOPPED, 0}

    return fault


def kill_a_rank(run: Running, draw: random.Random) -> set[int]:
    os.kill(draw.choice(run.ranks), signal.SIGKILL)
    return {1}


def kill_all(run: Running, draw: random.Random) -> set[int]:
    """As a node that loses power."""
    for process in (run.launcher.pid, *run.ranks):
        os.kill(process, signal.SIGKILL)
    return {-signal.SIGKILL}


def stall_a_rank(run: Running, draw: random.Random) -> set[int]:
    """Shorter than any limit."""
    rank = draw.choice(run.ranks)
    os.kill(rank, signal.SIGSTOP)
    time.sleep(draw.uniform(1, 8))
    os.kill(rank, signal.SIGCONT)
    return set()


RUNNING = {
    "SIGTERM": ask(signal.SIGTERM),
    "SIGHUP": ask(signal.SIGHUP),
    "SIGUSR1": ask(signal.SIGUSR1),
    "Ctrl-C": ask(signal.SIGINT),
    "Ctrl-C after SIGTERM": ask(signal.SIGTERM, signal.SIGINT),
    "a rank is killed": kill_a_rank,
    "all are killed": kill_all,
    "a rank stalls": stall_a_rank,
}


# While it does not.


def newest_file(config: RunConfig, draw: random.Random) -> Path:
    newest = directories.step_directory(config.run_dir, read_metadata(config.run_dir).step)
    return draw.choice(sorted(path for path in newest.rglob("*") if path.is_file()))


def flip_a_bit(config: RunConfig, draw: random.Random) -> None:
    path = newest_file(config, draw)
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut_a_file(config: RunConfig, draw: random.Random) -> None:
    path = newest_file(config, draw)
    os.truncate(path, draw.randrange(path.stat().st_size))


def lose_a_file(config: RunConfig, draw: random.Random) -> None:
    newest_file(config, draw).unlink()


def damage_metrics(config: RunConfig, draw: random.Random) -> None:
    with open(Path(config.run_dir) / draw.choice(["metrics.jsonl", "routing.jsonl"]), "ab") as file:
        file.write(draw.choice([b'{"step": 1', b"\xff\xfe\n", b"[]\n", b"\0" * 100]))


def lose_the_configuration(config: RunConfig, draw: random.Random) -> None:
    (Path(config.run_dir) / "config.yaml").unlink(missing_ok=True)


def leave_something(config: RunConfig, draw: random.Random) -> None:
    left = Path(config.run_dir) / "checkpoints" / f".tmp-step_{draw.randrange(10**8):08d}"
    kind = draw.choice(["file", "folder", "link"])
    if kind == "folder":
        (left / "state").mkdir(parents=True)
        (left / "state" / "__0_0.distcp").write_bytes(b"half")
    elif kind == "link":
        left.symlink_to("/nonexistent")
    else:
        left.write_bytes(b"")


STOPPED_FAULTS = [flip_a_bit, cut_a_file, lose_a_file, damage_metrics, lose_the_configuration, leave_something]


# What must hold.


def evaluate(config: RunConfig, directory: Path) -> str:
    """Judge the newest checkpoint while it may be replaced: a result, or one line."""
    result = directory / f"{Path(config.run_dir).name}.json"
    done = subprocess.run(
        [sys.executable, "-m", "megatron_most.commands", "evaluate", "--checkpoint", config.run_dir]
        + ["--suite", "text", "--data", directory / "text.txt", "--output", result, "--fresh"],
        cwd=ROOT,
        env=environment(**{MARK: str(directory), "TMPDIR": str(directory / "tmp")}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode == 0:
        assert json.loads(result.read_text())["num_failed"] == 0
        return "evaluated"
    assert re.fullmatch(r"error: [^\n]+", done.stderr.strip().splitlines()[-1]) and "Traceback" not in done.stderr, done
    return "evaluation in one line"


def memory_and_handles(process: int) -> tuple[int, int]:
    """Resident pages that no file backs, in KiB, and open files."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]), len(os.listdir(f"/proc/{process}/fd"))


def final_tensors(config: RunConfig) -> dict[str, directories.FileEntry]:
    """Size and checksum of every file of weights and optimizer state at the end."""
    entries = directories.read_manifest(directories.step_directory(config.run_dir, STEPS))
    found = {name: entry for name, entry in entries.items() if name.endswith(".distcp")}
    assert len(found) == 2
    return found


def processes_left(directory: Path) -> list[int]:
    mark, left = f"{MARK}={directory}".encode(), []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (path / "environ").read_bytes().split(b"\0"):
                left.append(int(path.name))
    return left


def go_on(config: RunConfig, draw: random.Random, directory: Path, met: Counter[str]) -> bool:
    """Start the run once, disturb it once, and see how it ends. False when it has reached its end."""
    before = steps_logged(config)
    with training(config, directory) as run:
        fault = draw.choice(sorted(RUNNING))
        at = min(STEPS, before + draw.randrange(1, STEPS // 4))
        wait_for("a step", lambda: steps_logged(config) >= at or run.launcher.poll() is not None, 240)
        if draw.random() < 0.2 and complete_checkpoints(config.run_dir)[0]:
            met[evaluate(config, directory)] += 1
        allowed: set[int] = set()
        if run.launcher.poll() is None:
            with contextlib.suppress(ProcessLookupError, IndexError):  # it ended by itself at this moment
                allowed = RUNNING[fault](run, draw)
                met[fault] += 1
        status = run.launcher.wait(240)
    log = (directory / f"{Path(config.run_dir).name}.log").read_text(errors="replace")
    aside = re.search(r"\bmv (\S+) (\S+?)[,;.]?(?: |$)", log, re.M)
    if status == 1 and aside and "error: " in log:
        # The way to go on that the message names.
        subprocess.run(["mv", aside[1], aside[2]], check=True)
        met["a damaged checkpoint is refused"] += 1
        return True
    assert status == 0 or status in allowed, (fault, status, log[-3000:])
    assert not (status in (0, STOPPED) and "Traceback" in log), (fault, log[-3000:])
    return status != 0


@pytest.mark.slow
@pytest.mark.timeout(int(MINUTES * 60 + 1800))
def test_faults_drawn_at_random_change_no_weight_and_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    undisturbed = soak_config(tmp_path, "undisturbed")
    with training(undisturbed, tmp_path) as run:
        wait_for("a sixth of the steps", lambda: steps_logged(undisturbed) >= STEPS // 6)
        ranks = run.ranks
        early = [memory_and_handles(rank) for rank in ranks]
        wait_for("nearly all steps", lambda: steps_logged(undisturbed) >= STEPS - 25, 600)
        late = [memory_and_handles(rank) for rank in ranks]
        assert run.launcher.wait(120) == 0
    assert len(early) == 2
    for (memory, handles), (memory_later, handles_later) in zip(early, late, strict=True):
        assert memory_later < 1.03 * memory and handles_later <= handles + 2, (early, late)
    expected, lines = final_tensors(undisturbed), metric_lines(undisturbed)
    assert not processes_left(tmp_path)

    draw, met, deadline = random.Random(SEED), Counter[str](), time.monotonic() + 60 * MINUTES
    runs = 0
    while time.monotonic() < deadline:
        config = soak_config(tmp_path, f"run{runs}")
        while go_on(config, draw, tmp_path, met):
            assert not processes_left(tmp_path), met
            if complete_checkpoints(config.run_dir)[0] and draw.random() < 0.5:
                fault = draw.choice(STOPPED_FAULTS)
                met[fault.__name__] += 1
                fault(config, draw)
        assert final_tensors(config) == expected, (SEED, runs, met)
        assert all(line in lines for line in metric_lines(config)), (SEED, runs, met)
        checkpoints = {path.name for path in (Path(config.run_dir) / "checkpoints").iterdir()}
        assert {name for name in checkpoints if not name.endswith(".damaged")} == {
            f"step_{step:08d}" for step in (STEPS - 20, STEPS - 10, STEPS)
        }
        subprocess.run(["rm", "-r", config.run_dir], check=True)
        runs += 1
        print(f"{runs} runs: {dict(met)}", flush=True)
    # A launcher that is killed cannot remove its own.
    assert len(list((tmp_path / "tmp").iterdir())) <= met["all are killed"]
