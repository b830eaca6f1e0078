"""Starts the runs that are not finished, through submitit: as processes of this machine or as SLURM arrays."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import submitit

from megatron_most.config import CONFIG, dump_config
from megatron_most.errors import ConfigError, first_line
from megatron_most.files import read_json, write_json, write_text
from megatron_most.processes import INTERRUPTED, deaf_children
from megatron_most.sweep.job import FAILURE, LOG, RESULT, STOPPED, Job, Programs, last_error, lock, pid_of
from megatron_most.sweep.plan import PlannedRun
from megatron_most.sweep.spec import Sweep

_JOBS = "jobs.json"
_POLL_SECONDS = 0.5


def state(run: PlannedRun) -> str:
    """``finished``, ``running``, ``stopped``, ``failed``, ``interrupted`` or ``to do``.

    A process locks the directory of a running run. A stopped one was asked to stop, and has saved.
    """
    directory = run.directory
    if not (directory / CONFIG).is_file():
        return "to do"
    if (directory / RESULT).is_file():
        return "finished"
    with lock(directory) as held:
        if held is None:
            return "running"
    for file, name in ((STOPPED, "stopped"), (FAILURE, "failed")):
        if (directory / file).is_file():
            return name
    return "interrupted" if (directory / LOG).is_file() else "to do"


def start(
    sweep: Sweep,
    runs: list[PlannedRun],
    executor: str,
    resume: bool,
    programs: Programs,
    report: Callable[[str], None],
) -> None:
    """Run what is not finished. ``local`` returns when all runs have ended, ``slurm`` when all are submitted.

    Stopped, failed and interrupted runs are retried; their training resumes from the newest checkpoint.

    Raises:
        ConfigError: data or checkpoints are missing, there is no SLURM, or the sweep was started before and ``resume``
            is not set.
        SystemExit: after Ctrl-C, with status 130, when the jobs of this machine have saved and ended.
    """
    missing = sorted({file for run in runs for file in run.missing})
    if missing:
        raise ConfigError(f"{sweep.path}: no such files: {', '.join(missing)}")
    begun = [run for run in runs if state(run) != "to do"]
    if begun and not resume:
        raise ConfigError(
            f"{sweep.spec.output}: {len(begun)} of the {len(runs)} runs were started before; use --resume to continue"
        )
    for run in runs:
        if not (run.directory / CONFIG).is_file():
            write_text(run.directory / CONFIG, dump_config(run.config))
    todo = [run for run in runs if state(run) != "finished"]
    report(f"{sweep.spec.name}: {len(runs) - len(todo)} of {len(runs)} runs are finished, {len(todo)} to do")
    if not todo:
        return
    if executor == "slurm":
        _submit_to_slurm(sweep, todo, programs, report)
    else:
        _run_here(sweep, todo, programs, report)


def _executor(sweep: Sweep, cluster: str) -> submitit.AutoExecutor:
    resources = sweep.spec.resources
    try:
        executor = submitit.AutoExecutor(folder=_own_folder(Path(sweep.spec.output) / "jobs"), cluster=cluster)
    except RuntimeError as error:
        raise ConfigError(f"--executor={cluster}: {first_line(error)}") from None
    executor.update_parameters(name=sweep.spec.name, timeout_min=resources.minutes)
    if cluster == "slurm":
        options = {"partition": resources.partition, "account": resources.account}
        executor.update_parameters(
            nodes=resources.nodes,
            tasks_per_node=1,
            cpus_per_task=resources.cpus_per_task,
            slurm_array_parallelism=resources.concurrent,
            **({"gpus_per_node": resources.gpus_per_node} if resources.gpus_per_node else {}),
            **{f"slurm_{key}": value for key, value in options.items() if value},
        )
    return executor


def _own_folder(folder: Path) -> Path:
    """Make the folder of pickled jobs, which only this user may write: a job runs whatever its pickle says.

    Raises:
        ConfigError: it cannot be made, or is another user's.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid != os.getuid():
            raise ConfigError(f"{folder}: belongs to user {found.st_uid}, who could make its jobs run anything")
        folder.chmod(stat.S_IMODE(found.st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made: {error.strerror}") from None
    return folder


def _job(sweep: Sweep, run: PlannedRun, programs: Programs) -> Job:
    return Job(str(run.directory.absolute()), run.identity, sweep.spec.resources, sweep.spec.evaluation, programs)


def _submit_to_slurm(sweep: Sweep, todo: list[PlannedRun], programs: Programs, report: Callable[[str], None]) -> None:
    executor = _executor(sweep, "slurm")
    path = Path(sweep.spec.output) / _JOBS
    known = read_json(path) if path.is_file() else {}
    queued = _queued(known.values())
    waiting = [run for run in todo if known.get(run.identity) in queued]
    todo = [run for run in todo if run not in waiting]
    if waiting:
        report(f"{len(waiting)} runs are already in the queue")
    if not todo:
        return
    with executor.batch():
        jobs = [executor.submit(_job(sweep, run, programs)) for run in todo]
    known |= {run.identity: job.job_id for run, job in zip(todo, jobs, strict=True)}
    write_json(path, known)
    report(f"submitted {len(jobs)} runs: {jobs[0].job_id} to {jobs[-1].job_id}; use --resume to collect them")


def _queued(job_ids: Iterable[str]) -> set[str]:
    """Jobs that wait or run. This asks SLURM's queue because not every cluster keeps accounts."""
    arrays = sorted({job_id.partition("_")[0] for job_id in job_ids})
    if not arrays:
        return set()
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={','.join(arrays)}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "Invalid job id" not in done.stderr:  # reported for jobs that have left the queue
        raise ConfigError(f"--executor=slurm: squeue: {' '.join(done.stderr.split())}")
    return set(done.stdout.split())


type _Active = tuple[PlannedRun, submitit.Job | None]
"""A run that is being executed; without its job where an earlier sweep started it."""


def _run_here(sweep: Sweep, todo: list[PlannedRun], programs: Programs, report: Callable[[str], None]) -> None:
    """Run ``concurrent`` jobs at a time; submitit's local executor has no queue."""
    executor = _executor(sweep, "local")
    active: list[_Active] = []
    number, done = len(todo), 0
    try:
        while todo or active:
            while todo and len(active) < sweep.spec.resources.concurrent:
                run = todo.pop(0)
                # A run that a killed sweep left running is only waited for.
                job = None if state(run) == "running" else _submit(executor, _job(sweep, run, programs))
                active.append((run, job))
            time.sleep(_POLL_SECONDS)
            for run, job in list(active):
                if _is_active((run, job)):
                    continue
                active.remove((run, job))
                if job is None and state(run) in ("stopped", "interrupted"):
                    todo.insert(0, run)  # it ended with the sweep that had started it
                    continue
                done += 1
                report(f"[{done}/{number}] {run.name}: {_end(run)}")
    except KeyboardInterrupt:
        _stop(active, report)
        raise SystemExit(INTERRUPTED) from None


def _submit(executor: submitit.AutoExecutor, job: Job) -> submitit.Job:
    # Neither the terminal's Ctrl-C nor its end reaches jobs: the sweep asks them to stop, or they go on without it.
    with deaf_children(signal.SIGINT, signal.SIGHUP):
        return executor.submit(job)


def _is_active(active: _Active) -> bool:
    run, job = active
    return state(run) == "running" or (job is not None and not job.done())


def _stop(active: list[_Active], report: Callable[[str], None]) -> None:
    """Ask all jobs to save and end, and wait for them; Ctrl-C again does not wait."""
    report(f"interrupted: {len(active)} runs save and stop (Ctrl-C again: do not wait); use --resume to continue")
    for run, job in active:
        # A job that has not begun yet is known to submitit alone: its number is that of its process.
        begun = None if job is None else int(job.job_id)
        pid = (pid_of(run.directory) if state(run) == "running" else None) or begun
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
    with contextlib.suppress(KeyboardInterrupt):
        while any(map(_is_active, active)):
            time.sleep(_POLL_SECONDS)


def _end(run: PlannedRun) -> str:
    """How a run ended; writes the failure of a job that was killed before it could."""
    if (run.directory / RESULT).is_file():
        seconds = read_json(run.directory / RESULT)["seconds"]
        return f"finished in {seconds:.0f} s"
    if (run.directory / STOPPED).is_file():
        return "stopped and saved; use --resume to continue"
    failure = run.directory / FAILURE
    if not failure.is_file():
        error = f"its job was killed or ran out of time; its last output: {last_error(run.directory / LOG)}"
        write_json(failure, {"identity": run.identity, "attempts": 1, "error": error, "last_lines": []})
    return f"failed: {read_json(failure)['error']}"
