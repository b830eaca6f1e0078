"""TensorBoard and wandb: copies of what ``metrics.jsonl`` holds. A copy that fails ends with a warning, not the run."""

from __future__ import annotations

import os
import re
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from megatron_most.config import LoggingConfig
from megatron_most.errors import ConfigError, first_line
from megatron_most.files import read_text, set_aside, write_text

WANDB_ID = ".wandb_id"
_TENSORBOARD = "tensorboard"
_IDENTITY = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Tracker(Protocol):
    """Takes scalars of a step; may raise anything."""

    name: str

    def write(self, step: int, scalars: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """The trackers of a run, on rank 0. One that fails is dropped with a warning."""

    def __init__(self, run_dir: Path, logging: LoggingConfig, resume_step: int, run_config: dict[str, Any]) -> None:
        """Raises :class:`ConfigError` if one cannot be started."""
        self._active: list[Tracker] = []
        if logging.tensorboard:
            self._active.append(TensorBoard(run_dir, resume_step))
        if logging.wandb_project:
            self._active.append(Wandb(run_dir, logging.wandb_project, run_config))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._for_each(lambda tracker: tracker.write(step, scalars))

    def close(self) -> None:
        self._for_each(lambda tracker: tracker.close())
        self._active = []

    def _for_each(self, act: Callable[[Tracker], None]) -> None:
        for tracker in list(self._active):
            try:
                act(tracker)
            except Exception as error:  # a full disk, a network, and whatever wandb trips over
                self._active.remove(tracker)
                reason = first_line(error)
                print(f"warning: {tracker.name} gets no more metrics: {reason}; metrics.jsonl has all", flush=True)


class TensorBoard:
    """Writes an event file. Not torch's ``SummaryWriter``: its thread shows a full disk as a traceback.

    Args:
        resume_step: TensorBoard forgets later steps of earlier files.
    """

    name = "TensorBoard"

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder = run_dir / _TENSORBOARD
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        try:
            if os.path.lexists(folder) and not folder.is_dir():
                print(f"warning: {folder} is not a folder: moved to {set_aside(folder)}", flush=True)
            folder.mkdir(exist_ok=True)
            # Unbuffered: after an error, nothing is left to be written again when the file is closed.
            self._file = open(folder / name, "ab", buffering=0)  # noqa: SIM115 - open as long as the run
            self._records = RecordWriter(self._file)
            self._add(file_version="brain.Event:2")
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(step=resume_step + 1, session_log=start)
        except OSError as error:
            raise ConfigError(f"{folder}: cannot be written: {error.strerror or error}") from None

    def write(self, step: int, scalars: dict[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._add(step=step, summary=self._summary(value=values))

    def _add(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())

    def close(self) -> None:
        self._file.close()


class Wandb:
    """Writes to wandb. A resumed run continues the same wandb run, whose id is in :data:`WANDB_ID`."""

    name = "wandb"

    def __init__(self, run_dir: Path, project: str, run_config: dict[str, Any]) -> None:
        import wandb

        identity = wandb_identity(run_dir / WANDB_ID)
        try:
            self._run = wandb.init(
                project=project, name=run_dir.name, id=identity, resume="allow", dir=str(run_dir), config=run_config
            )
        except Exception as error:  # no key, no network, no space: their errors have no common base class
            raise ConfigError(f"logging.wandb_project={project!r}: wandb does not start: {first_line(error)}") from None

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def close(self) -> None:
        self._run.finish()


def wandb_identity(path: Path) -> str:
    """The id in ``path``; a new one where there is none, or where what is there is damaged: that is set aside."""
    if os.path.lexists(path):
        try:
            if _IDENTITY.fullmatch(identity := read_text(path, limit=1024, errors="replace")):
                return identity
        except ConfigError:
            pass
        try:
            print(f"warning: {path} holds no id of wandb: moved to {set_aside(path)}; a new run begins", flush=True)
        except OSError as error:
            raise ConfigError(f"{path}: holds no id of wandb, and cannot be moved: {error.strerror}") from None
    identity = uuid.uuid4().hex[:12]
    write_text(path, identity)
    return identity
