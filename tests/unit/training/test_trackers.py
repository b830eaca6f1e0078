"""TensorBoard and wandb are copies: what goes wrong with them is a warning, and nothing of the run is lost."""

import errno
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from megatron_most.config import LoggingConfig
from megatron_most.errors import ConfigError
from megatron_most.training import trackers
from megatron_most.training.metrics import MetricsWriter
from megatron_most.training.trackers import WANDB_ID, TensorBoard, Trackers, wandb_identity


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard reads from the event files of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_tensorboard_reads_what_was_written_and_forgets_steps_that_are_repeated(tmp_path, monkeypatch):
    for start, resume_step, steps in ((1000, 0, (1, 2, 3)), (2000, 2, (3, 4))):
        monkeypatch.setattr(trackers.time, "time", lambda start=start: float(start))
        writer = TensorBoard(tmp_path, resume_step)
        for step in steps:
            writer.write(step, {"loss": step / 2 + start, "lr": 0.5})
        writer.close()
    found = scalars(tmp_path / "tensorboard")
    assert found["loss"] == [(1, 1000.5), (2, 1001.0), (3, 2001.5), (4, 2002.0)]
    assert [step for step, _ in found["lr"]] == [1, 2, 3, 4]


def test_a_full_disk_ends_a_tracker_and_not_the_run(tmp_path, capsys):
    writer = MetricsWriter(tmp_path, LoggingConfig(tensorboard=True), 100, 0, ("text",), {})
    [tracker] = writer.trackers._active
    full = open("/dev/full", "ab", buffering=0)  # noqa: SIM115 - the tracker closes it
    tracker._file.close()
    tracker._file, tracker._records = full, type(tracker._records)(full)
    for step in (1, 2):
        writer.validation(step, {"validation/a/loss": 1.0})
    writer.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    warning = "warning: TensorBoard gets no more metrics: No space left on device; metrics.jsonl has all\n"
    assert capsys.readouterr().out.count(warning) == 1
    full.close()


def test_a_folder_that_cannot_be_written_is_one_line_and_a_file_makes_way(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("x")
    TensorBoard(tmp_path, 0).close()
    assert "tensorboard is not a folder: moved to" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="tensorboard: cannot be written: No such file"):
        TensorBoard(tmp_path / "absent", 0)


@pytest.mark.parametrize("damage", ["folder", "pipe", "dangling", "bytes", "empty", "long"])
def test_a_damaged_wandb_id_is_set_aside(tmp_path, capsys, damage):
    path = tmp_path / WANDB_ID
    {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "dangling": lambda: path.symlink_to("nowhere"),
        "bytes": lambda: path.write_bytes(b"\xff/../x"),
        "empty": lambda: path.write_bytes(b""),
        "long": lambda: path.write_bytes(b"a" * 5000),
    }[damage]()
    identity = wandb_identity(path)
    assert "holds no id of wandb: moved to" in capsys.readouterr().out
    assert os.path.lexists(tmp_path / f"{WANDB_ID}.damaged")
    assert wandb_identity(path) == identity  # and from now on it is the run's


def fake_wandb(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(**functions))


def fail(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_wandb_that_fails_later_is_dropped_and_one_that_does_not_start_is_one_line(tmp_path, monkeypatch, capsys):
    logging = LoggingConfig(tensorboard=False, wandb_project="most")
    fake_wandb(monkeypatch, init=lambda **_: types.SimpleNamespace(log=fail, finish=fail))
    active = Trackers(tmp_path, logging, 0, {})
    active.write(1, {"loss": 1.0})
    active.close()
    assert "warning: wandb gets no more metrics: No space left on device" in capsys.readouterr().out
    fake_wandb(monkeypatch, init=fail)
    with pytest.raises(ConfigError, match="wandb_project='most': wandb does not start: No space left on device"):
        Trackers(tmp_path, logging, 0, {})
