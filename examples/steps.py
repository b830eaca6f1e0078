"""Runs the steps of an example: commands that a user could type, one after another, each once.

Complete steps are skipped, so an interrupted example resumes when it is run again. A step is repeated if its command or
one of its input files has changed, and so are the steps after it. Checkpoints of another configuration or other data
are an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from examples.outlook import Outlook, Ticker, about
from megatron_most import cli
from megatron_most.audio import file_fingerprint
from megatron_most.errors import MostError
from megatron_most.files import write_text
from megatron_most.processes import call

# Not torch, which takes seconds to import: the first step is to begin at once.

ROOT = Path(__file__).resolve().parents[1]

SHORT = 6.0
"""Seconds that a step takes for which nothing is said."""


@dataclass
class Step:
    """One command and the files it depends on in addition to earlier steps.

    Args:
        trains: run directory of the training that the command begins or continues; None if it does something else.
        training_steps: the step that training has to reach; it may be asked to stop earlier.
        expected: seconds that all of it takes.
        replaces: a folder that the command writes and would not replace; it is removed before.
    """

    name: str
    what: str
    command: list[str]
    inputs: list[Path] = field(default_factory=list)
    trains: Path | None = None
    training_steps: int | None = None
    expected: float = SHORT
    replaces: Path | None = None

    @property
    def seconds(self) -> float:
        """What it is expected to take from where it is."""
        return self.expected * (1 - self.reached())

    def reached(self) -> float:
        """Which fraction of it is done; only training can tell, and begins where it ended."""
        if self.trains is None or self.training_steps is None:
            return 0.0
        try:
            *_, last, _ = (ROOT / self.trains / "metrics.jsonl").read_bytes().split(b"\n")
            return min(json.loads(last)["step"] / self.training_steps, 0.99)
        except (OSError, ValueError, KeyError):
            return 0.0


def most(*commands: Sequence[str]) -> list[str]:
    """The command that runs these ``most`` commands one after another in one process, which imports torch once."""
    return [sys.executable, "examples/most_commands.py", *map(shlex.join, commands)]


def run_steps(steps: list[Step], run_dir: Path, machine: str = "two cores") -> None:
    """Run the steps that are not complete, which are expected to run on ``machine``.

    Raises:
        MostError: a step failed, or would resume the work of another configuration.
        SystemExit: after Ctrl-C, with status 130, when the step has saved what it had.
    """
    stamps = run_dir / "steps"
    stamps.mkdir(parents=True, exist_ok=True)
    identity, identities = "", []
    for step in steps:
        identity = _identity(identity, step)
        identities.append(identity)
    is_done = [_read(stamps / f"{step.name}.done") == one for step, one in zip(steps, identities, strict=True)]
    expected = [0.0 if done else step.seconds for step, done in zip(steps, is_done, strict=True)]
    outlook, todo = Outlook(sum(expected)), is_done.count(False)
    print(f"{todo} of {len(steps)} steps to do: {about(outlook.expected)} on {machine}", flush=True)
    for number, (step, identity, done) in enumerate(zip(steps, identities, is_done, strict=True), start=1):
        label = f"[{number}/{len(steps)}] {step.what}"
        if done:
            print(f"{label}: done already", flush=True)
            continue
        print(label, *_shown(step.command), sep="\n    ", flush=True)
        start = time.monotonic()
        if step.trains is not None:
            _claim(ROOT / step.trains, stamps / f"{step.name}.started", identity)
        if step.replaces is not None:
            shutil.rmtree(ROOT / step.replaces, ignore_errors=True)
        _run(step, outlook, expected[number - 1])
        write_text(stamps / f"{step.name}.done", identity)
        seconds = time.monotonic() - start
        outlook.end(expected[number - 1], seconds)
        todo -= 1
        print(f"{label}: {seconds:.0f} s" + (f", {about(outlook.left())} left" if todo else ""), flush=True)


def _run(step: Step, outlook: Outlook, expected: float) -> None:
    before = step.reached()

    def say(elapsed: float) -> None:
        reached = step.reached()
        fraction = (reached - before) / (1 - before) if reached > before else None
        print(f"    {about(outlook.left(expected, elapsed, fraction))} left of all steps", flush=True)

    def on_interrupt() -> None:
        ticker.stop()
        print(f"interrupted: step {step.name} stops; run again to continue", file=sys.stderr, flush=True)

    with Ticker(say) as ticker:
        status = call(step.command, cwd=ROOT, environment=_environment(), on_interrupt=on_interrupt)
    if status and not (step.trains is not None and status == cli.STOPPED):
        raise MostError(f"step {step.name} failed with status {status}; fix the error above and run again")
    if step.trains is not None and step.training_steps is not None:
        _require_trained(step.name, ROOT / step.trains, step.training_steps)


def _claim(run_dir: Path, started: Path, identity: str) -> None:
    """Record whose work ``run_dir`` holds; raise MostError if it is that of a step with another identity."""
    if _read(started) not in (None, identity):
        from megatron_most.checkpointing.directory import checkpoints_directory

        folder = checkpoints_directory(run_dir)
        if folder.is_dir() and any(folder.iterdir()):
            raise MostError(
                f"{run_dir} was trained with another configuration or other data: remove it or use --run-dir"
            )
    write_text(started, identity)


def _read(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


def _require_trained(name: str, run_dir: Path, steps: int) -> None:
    from megatron_most.checkpointing import read_metadata

    reached = read_metadata(run_dir).step
    if reached < steps:
        raise MostError(f"{name} was stopped after step {reached} of {steps}; run again to continue")


def _identity(previous: str, step: Step) -> str:
    """A hash of the commands and files of this step and of all steps before it."""
    parts = [previous, *step.command, *(file_fingerprint(ROOT / path) for path in step.inputs)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _shown(command: Sequence[str]) -> list[str]:
    """The command in a line; none for what shows the commands that it runs itself."""
    if command[1:2] == most()[1:]:
        return []
    return [" ".join("python" if part == sys.executable else shlex.quote(part) for part in command)]


def _environment() -> dict[str, str]:
    """Makes the package importable, and limits threads: ranks and workers set their own."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
