"""``most plan`` and ``most train --dry-run``: what they look for, and one line for what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_most.commands import plan, train

CONFIG = str(Path(__file__).parents[3] / "examples" / "configs" / "most_debug.yaml")


def error_of(command, *arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exited:
        command.main(["--config", CONFIG, *arguments])
    assert exited.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(("command", "arguments"), [(plan, ["--gpus", "2"]), (train, ["--dry-run"])])
def test_missing_files_are_one_line_unless_they_do_not_matter(
    command, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)  # set by tests that make process groups
    line = error_of(command, *arguments, capsys=capsys)
    assert line.startswith("error: data.train: runs/quickstart/data/train_asr.json: is missing (and ")
    assert line.endswith("--no-check-files plans for another machine")
    command.main(["--config", CONFIG, *arguments, "--no-check-files"])
    assert "a step on h100, estimated by a roofline" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run", "--world-size", "0"], "--world-size=0: must be greater than 0"),
        (["--dry-run", "--no-check-files", "--world-size", "3"], "= 2 must divide the world size, 3"),
        (["--dry-run", "--no-check-files", "--world-size", "64"], "training.global_batch_size=8: must be divisible by"),
        (["--world-size", "2"], "--world-size=2: needs --dry-run"),
    ],
)
def test_an_implausible_number_of_ranks_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error_of(train, *arguments, capsys=capsys)


def test_a_speed_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--tflops=0.0: must be greater than 0" in error_of(plan, "--gpus", "2", "--tflops", "0", capsys=capsys)
