"""``most torchrun``: a typo is seen before ranks start, and the last line is the first failed rank's error."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import run as launcher
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_most import cli
from megatron_most.commands import torchrun
from megatron_most.commands.train import STOPPED_FILE
from megatron_most.config import dump_config
from megatron_most.errors import DataError
from tests.distributed.tiny import tiny_config

ROOT = Path(__file__).parents[3]
TRAIN = "megatron_most.commands.train"

RANK = """
import argparse, os, pathlib, sys, time
from megatron_most import cli
from megatron_most.errors import DataError

def command(arguments):
    pathlib.Path(arguments.folder, os.environ["RANK"]).touch()
    if not arguments.fail:
        time.sleep(60)
    if os.environ["RANK"] == "1":
        raise DataError("row 7 is broken")
    time.sleep(3)
    sys.exit(1)

parser = argparse.ArgumentParser()
parser.add_argument("folder")
parser.add_argument("--fail", action="store_true")
cli.run(parser, command)
"""


@pytest.fixture
def config_file(tmp_path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(tiny_config(run_dir=tmp_path / "run")), encoding="utf-8")
    return path


@pytest.fixture
def started(monkeypatch) -> list[argparse.Namespace]:
    """The command lines that reach torch's launcher, which starts nothing here."""
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(launcher, "run", seen.append)
    for name in ("OMP_NUM_THREADS", "LOGLEVEL", STOPPED_FILE, "PET_SIGNALS_TO_HANDLE", "PET_SHUTDOWN_TIMEOUT"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    return seen


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hidden_sise=3", "did you mean 'hidden_size'"),
        ("parallel.expert_model_parallel_size=4", "= 4 ranks, but only 2 were started"),
    ],
)
def test_a_typo_is_one_line_and_starts_no_rank(started, config_file, capsys, override, message):
    with pytest.raises(SystemExit) as left:
        torchrun.main(["--nproc-per-node", "2", "-m", TRAIN, "--config", str(config_file), override])
    assert left.value.code == 1 and not started
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_a_sound_run_and_other_programs_are_started(started, config_file):
    for arguments in (
        ["--nproc-per-node", "2", "-m", TRAIN, "--config", str(config_file)],
        ["--nproc-per-node", "2", "-m", TRAIN, "--config", str(config_file), "--dry-run", "--debug"],
        ["--standalone", "script.py", "--help"],
    ):
        with pytest.raises(SystemExit) as left:
            torchrun.main(arguments)
        assert left.value.code is None
    assert [options.training_script for options in started] == [TRAIN, TRAIN, "script.py"]
    assert started[2].training_script_args == ["--help"]


def test_its_own_help_is_short(capsys):
    with pytest.raises(SystemExit) as left:
        torchrun.main(["-h"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("usage: most torchrun [-h]")


def failure(tmp_path: Path, rank: int, exitcode: int, message: str = "") -> ProcessFailure:
    error_file = tmp_path / f"{rank}.json"
    if message:
        more = {"py_callstack": message, "timestamp": "1"}
        error_file.write_text(json.dumps({"message": {"message": message, "extraInfo": more}}))
    return ProcessFailure(rank, 100 + rank, exitcode, str(error_file))


def test_the_rank_that_said_why_is_the_cause(tmp_path):
    failures = {0: failure(tmp_path, 0, -15), 1: failure(tmp_path, 1, 1, "row 7 is broken")}
    assert torchrun.root_cause(ChildFailedError("x", failures)) == "rank 1: row 7 is broken"
    killed = {0: failure(tmp_path, 2, 1), 3: failure(tmp_path, 3, -9)}
    killed[0].timestamp += 1
    assert torchrun.root_cause(ChildFailedError("x", killed)) == "rank 3: was ended by signal 9 (SIGKILL)"
    del killed[3]
    assert torchrun.root_cause(ChildFailedError("x", killed)).startswith("rank 0: ended with status 1; ")


def test_torchrun_itself_quotes_the_error_in_its_report(tmp_path, monkeypatch):
    def broken(arguments):
        raise DataError("row 7 is broken")

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit):
        cli.run(argparse.ArgumentParser(), broken, [])
    found = ProcessFailure(0, 1, 1, str(tmp_path / "error.json"))
    report = str(ChildFailedError("train", {0: found})).splitlines()
    assert report[-2].endswith(": row 7 is broken") and abs(found.timestamp - time.time()) < 60


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen:
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", torchrun.__name__, "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*command, str(tmp_path / "rank.py"), str(tmp_path), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_the_error_of_a_rank_is_the_last_line(tmp_path):
    process = start(tmp_path, "--fail")
    _, err = process.communicate(timeout=100)
    lines = err.splitlines()
    assert process.returncode == 1 and "Traceback" not in err
    assert lines[0] == "error: row 7 is broken" and lines[-1] == "error: rank 1: row 7 is broken"


@pytest.mark.slow
def test_ctrl_c_is_one_line_for_all_ranks(tmp_path):
    process = start(tmp_path)
    while not all((tmp_path / rank).exists() for rank in "01"):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")
