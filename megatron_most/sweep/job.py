"""One run of a sweep, in the process that submitit starts for it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from megatron_most import cli
from megatron_most.cli import launcher_integer
from megatron_most.config import CONFIG, load_config
from megatron_most.errors import DataError, MostError
from megatron_most.files import read_json, write_json
from megatron_most.locks import locked
from megatron_most.processes import end_with_parent
from megatron_most.sweep.spec import EvaluationConfig, ResourcesConfig

RESULT = "sweep_result.json"
FAILURE = "sweep_failure.json"
STOPPED = "sweep_stopped.json"
LOG = "sweep.log"
_LOCK = ".sweep.lock"
_PORT = 20000
_PORTS = 10000
_SAVE_SECONDS = 600
_LAST_LINES = 15


_process: subprocess.Popen | None = None
"""The process that runs now, to pass signals on to it. Not in the job, which submitit pickles to requeue it."""


@dataclass
class Programs:
    """Command lines of a run, without their options. The command passes them in, since they are of a higher layer.

    Args:
        train: takes ``--config FILE`` and starts the ranks of one machine.
        train_node: the same for one of several nodes.
        evaluate: takes the options of ``most evaluate``.
    """

    train: list[str]
    train_node: list[str]
    evaluate: list[str]


@dataclass
class Job:
    """Train, evaluate, and write to the run directory how it ended. A call after a result does nothing.

    That is a result, a failure, or, when training was asked to stop and has saved, a note that it can go on.

    Args:
        directory: the run directory, with the resolved configuration.
        identity: of the run, recorded in its result.
    """

    directory: str
    identity: str
    resources: ResourcesConfig
    evaluation: list[EvaluationConfig]
    programs: Programs
    is_stopped: bool = False

    def __call__(self) -> None:
        directory = Path(self.directory)
        node = launcher_integer("SLURM_NODEID", 0)
        if node > 0:  # the first node evaluates and writes the result
            self._train(directory, directory / f"sweep_node_{node}.log", ())
            return
        with lock(directory) as held:
            if held is not None and not (directory / RESULT).is_file():
                held.truncate(0)
                held.write(str(os.getpid()).encode())
                held.flush()
                if os.environ.get("SUBMITIT_EXECUTOR") == "local":
                    signal.signal(signal.SIGTERM, self._stop)
                self._run(directory, held.fileno())

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Let what runs now save and end; the run is then neither finished nor failed."""
        self.is_stopped = True
        if _process is not None:
            _process.terminate()

    def checkpoint(self) -> object:
        """Called by submitit before SLURM ends the job: let training save, then requeue the same job."""
        import submitit

        if _process is not None:
            _process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                _process.wait(_SAVE_SECONDS)
        return submitit.helpers.DelayedSubmission(self)

    def _run(self, directory: Path, held: int) -> None:
        log, failure = directory / LOG, directory / FAILURE
        (directory / STOPPED).unlink(missing_ok=True)
        attempts = _attempts(failure) + 1
        start = time.time()
        status = self._train(directory, log, (held,))
        if status == cli.STOPPED:
            write_json(directory / STOPPED, {"identity": self.identity})
            return
        error = _ended("training", status, log) or self._unfinished(directory)
        for one in self.evaluation:
            if error or self.is_stopped:
                break
            error = _ended(f"evaluation {one.name}", self._evaluate(one, directory, log, (held,)), log)
        if self.is_stopped:
            return
        facts = {"identity": self.identity, "attempts": attempts, "seconds": time.time() - start}
        if error:
            write_json(failure, {**facts, "error": error, "last_lines": _last_lines(log)})
        else:
            write_json(directory / RESULT, {**facts, "resources": asdict(self.resources)})
            failure.unlink(missing_ok=True)

    def _train(self, directory: Path, log: Path, descriptors: tuple[int, ...]) -> int:
        environment = {"PET_NPROC_PER_NODE": str(self.resources.ranks)}
        program = self.programs.train
        if self.resources.nodes > 1:
            program = self.programs.train_node
            environment |= _meeting_point()
            environment["PET_NNODES"] = str(self.resources.nodes)
            environment["PET_LOG_DIR"] = str(directory / "logs" / os.environ["SLURMD_NODENAME"])
        return self._call([*program, "--config", str(directory / CONFIG)], log, environment, descriptors)

    def _unfinished(self, directory: Path) -> str:
        """Why training that exited with status 0 is not complete; empty if it is."""
        from megatron_most.checkpointing import read_metadata  # its import takes seconds

        steps = load_config(directory / CONFIG).training.train_iters
        try:
            reached = read_metadata(directory).step
        except MostError as error:
            return f"training left no checkpoint: {error}"
        return "" if reached >= steps else f"training ended with status 0 after step {reached} of {steps}"

    def _evaluate(self, one: EvaluationConfig, directory: Path, log: Path, descriptors: tuple[int, ...]) -> int:
        output = directory / "evaluation" / f"{one.name}.json"
        command = [*self.programs.evaluate, "--checkpoint", str(directory)]
        command += ["--suite", one.suite, "--data", one.data, "--output", str(output)]
        command += ["--normalizer", one.normalizer] if one.normalizer else []
        command += ["--limit", str(one.limit)] if one.limit else []
        command += ["--vocabulary", *one.vocabulary] if one.vocabulary else []
        return self._call(command, log, {}, descriptors)

    def _call(self, command: list[str], log: Path, environment: dict[str, str], descriptors: tuple[int, ...]) -> int:
        """Run a command and return its status. It inherits ``descriptors``, and with them the lock."""
        global _process
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # launchers start python
        # submitit sets variables that torchrun would take for its own.
        inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        with open(log, "a", encoding="utf-8") as output:
            _process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**inherited, "PATH": path, **environment},
                pass_fds=descriptors,
                preexec_fn=end_with_parent,
            )
            if self.is_stopped:
                _process.terminate()  # the signal came before there was a process to pass it on to
            try:
                return _process.wait()
            finally:
                _process = None


def _meeting_point() -> dict[str, str]:
    """Rendezvous of torchrun's agents in a SLURM job: its first node, at a port derived from the job's number."""

    def told(*command: str) -> str:
        return subprocess.run(["scontrol", "show", *command], capture_output=True, text=True, check=True).stdout

    first = told("hostnames", os.environ["SLURM_JOB_NODELIST"]).split()[0]
    # SLURM's name of a node need not resolve in the network.
    (address,) = re.findall(r"NodeAddr=(\S+)", told("node", first))
    number = int(os.environ["SLURM_JOB_ID"])
    return {
        "PET_RDZV_ENDPOINT": f"{address}:{_PORT + number % _PORTS}",
        "PET_RDZV_ID": f"{number}-{os.environ.get('SLURM_RESTART_COUNT', 0)}",
    }


def pid_of(directory: Path) -> int | None:
    """The process of the job that locks a run directory; None if that is gone. Ask only while it is locked."""
    try:
        pid = int((directory / _LOCK).read_text(encoding="utf-8"))
        is_job = b"submitit" in Path(f"/proc/{pid}/cmdline").read_bytes()  # the number may be another's by now
    except (OSError, ValueError):
        return None
    return pid if is_job else None


def lock(directory: Path) -> contextlib.AbstractContextManager[BinaryIO | None]:
    """Lock a run directory for the block, and for as long as a process lives that inherits the yielded file.

    Yields None if another process holds the lock.
    """
    return locked(directory / _LOCK, wait=False)


def _ended(what: str, status: int, log: Path) -> str:
    return f"{what} ended with status {status}: {last_error(log)}" if status else ""


def _attempts(failure: Path) -> int:
    try:
        return int(read_json(failure, DataError)["attempts"])
    except (DataError, ValueError, KeyError):
        return 0


def last_error(log: Path) -> str:
    """The last line of a log that reports an error, else its last line."""
    lines = _last_lines(log, 200)
    errors = [line for line in lines if line.startswith("error:") or "Error" in line.split(":")[0]]
    return (errors or lines or ["no output"])[-1]


def _last_lines(log: Path, count: int = _LAST_LINES) -> list[str]:
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line.strip() for line in text.splitlines() if line.strip()][-count:]
