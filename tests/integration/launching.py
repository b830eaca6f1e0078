"""What tests of the launchers share: a small run in a file, and its metrics without an interruption."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_most.config import RunConfig, dump_config
from tests.distributed.harness import run_ranks
from tests.integration.tiny_run import metric_lines, run_config, train

ROOT = Path(__file__).parents[2]
STEPS = 60


def small_run(directory: Path, run_name: str) -> RunConfig:
    """A run of two ranks that takes some seconds, saves every fourth step and logs every step."""
    config = run_config(
        directory,
        run_name,
        parallel__expert_model_parallel_size=2,
        training__train_iters=STEPS,
        training__eval_interval=0,
        checkpoint__save_interval=4,
        logging__log_interval=1,
    )
    (directory / f"{run_name}.yaml").write_text(dump_config(config), encoding="utf-8")
    return config


def undisturbed_metrics(directory: Path) -> list[dict[str, Any]]:
    config = small_run(directory, "undisturbed")
    run_ranks(2, train, config)
    return metric_lines(config)


def environment(**settings: str) -> dict[str, str]:
    """This process's, with the interpreter's commands on PATH, this repository importable, no GPU and one thread."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **settings,
    }


@contextlib.contextmanager
def started(command: list[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process in a session of its own. At the end, also of a test that fails, no process of its group is left."""
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def steps_logged(config: RunConfig) -> int:
    """The newest step in the run's metrics; a line that is being written does not count."""
    path = Path(config.run_dir) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for(what: str, happened: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(0.05)
