"""Metrics: accumulated between two logged lines, then written as JSON lines, to TensorBoard, wandb, and the console.

Only rank 0 writes. ``metrics.jsonl`` and ``routing.jsonl`` are appended to and flushed line by line. A resumed run
first drops the lines after its checkpoint, so that every step appears once.
"""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_most.config import LoggingConfig, MoEConfig
from megatron_most.errors import ConfigError
from megatron_most.files import parse_json, write_text
from megatron_most.training.routing_metrics import RoutingMetrics
from megatron_most.training.run_directory import METRICS, ROUTING
from megatron_most.training.trackers import Trackers

BITS_PER_BYTE, PERPLEXITY = "retention/bits_per_byte", "retention/perplexity"


class MetricAccumulator:
    """Sums since the last logged line, the same on every rank. Checkpoints hold them.

    Args:
        names: rows of the metric table, see :class:`~megatron_most.training.loss.LossTable`.
        moe: the expert groups, for :class:`~megatron_most.training.routing_metrics.RoutingMetrics`.
    """

    def __init__(self, names: list[str], moe: MoEConfig) -> None:
        self.names = names
        self.routing = RoutingMetrics(moe)
        self.reset()

    def reset(self) -> None:
        self.table = [[0.0, 0.0] for _ in self.names]
        self.routing.sums = []
        self.fp8_rows = [0.0, 0.0]

    def add(self, table: list[list[float]], is_finite: bool = True) -> None:
        """Add the table of one step, already summed over ranks.

        A step whose loss or gradient norm is not finite only counts its tokens. What the routers did since the last
        line is dropped with it: sums of the other steps are not kept apart from that step's.
        """
        for name, mine, new in zip(self.names, self.table, table, strict=True):
            if is_finite or name == "tokens":
                mine[0] += new[0]
                mine[1] += new[1]
        if not is_finite:
            self.routing.sums = []

    def add_fp8_rows(self, padded: float, rows: float) -> None:
        """Add the rows of FP8 experts that were padding, and all their rows, summed over ranks."""
        self.fp8_rows = [self.fp8_rows[0] + padded, self.fp8_rows[1] + rows]

    def means(self) -> dict[str, float]:
        """:func:`mean_losses` of the sums, :meth:`RoutingMetrics.metrics`, and the fraction of FP8 padding."""
        padded, rows = self.fp8_rows
        padding = {"fp8_padding": padded / rows} if rows else {}
        return mean_losses(self.names, self.table) | self.routing.metrics() | padding

    @property
    def tokens(self) -> int:
        """Positions that are not padding, since the last line."""
        return int(self.table[self.names.index("tokens")][0])

    def state(self) -> dict[str, Any]:
        table = dict(zip(self.names, self.table, strict=True))
        return {"table": table, "routing": self.routing.sums, "fp8_rows": self.fp8_rows}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state`. Rows that do not exist in this version are dropped."""
        self.reset()
        if state:
            self.table = [state["table"].get(name, [0.0, 0.0]) for name in self.names]
            self.routing.sums = state["routing"]
            self.fp8_rows = state.get("fp8_rows", [0.0, 0.0])


def mean_losses(names: Sequence[str], table: list[list[float]]) -> dict[str, float]:
    """Sum / count of every loss that had a target."""
    return {
        name: total / count for name, (total, count) in zip(names, table, strict=True) if name != "tokens" and count
    }


class JsonLines:
    """An append-only file of JSON objects, one per line, each written at once.

    Args:
        resume_step: lines of later steps and an incomplete last line are dropped from an existing file, and so are
            damaged lines, with a warning.

    Raises:
        ConfigError: here and in :meth:`write`: the file cannot be read or written.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        try:
            *lines, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
            steps = [_step(line) for line in lines]
            kept = [line for line, step in zip(lines, steps, strict=True) if step is not None and step <= resume_step]
            write_text(path, "".join(f"{line.decode()}\n" for line in kept))
            # Unbuffered: after an error, nothing is left to be written again when the file is closed.
            self.stream = open(path, "ab", buffering=0)  # noqa: SIM115 - open as long as the run
        except OSError as error:
            raise _unwritable(path, error) from None
        if None in steps:
            print(f"warning: {path}: dropped {steps.count(None)} damaged lines", flush=True)

    def write(self, values: dict[str, Any]) -> None:
        rest = json.dumps(values, allow_nan=False).encode() + b"\n"
        try:
            while rest:
                rest = rest[self.stream.write(rest) :]
        except OSError as error:
            raise _unwritable(self.path, error) from None

    def close(self) -> None:
        self.stream.close()


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{path}: cannot be read or written: {error.strerror}; repair that, and run again to continue")


def require_installed(logging: LoggingConfig) -> None:
    """Raise :class:`ConfigError` if TensorBoard or wandb is enabled but not installed."""
    asked = (
        (logging.tensorboard, "tensorboard", "logging.tensorboard=True: tensorboard"),
        (logging.wandb_project, "wandb", f"logging.wandb_project={logging.wandb_project!r}: wandb"),
    )
    for wanted, module, what in asked:
        if wanted:
            try:
                importlib.import_module(module)
            except ImportError:
                raise ConfigError(f"{what} is not installed (pip install {what.split()[-1]})") from None


class MetricsWriter:
    """Writes the metrics of a run, on rank 0. Call :func:`require_installed` first.

    Args:
        run_dir: where to write ``metrics.jsonl``, ``routing.jsonl``, and ``tensorboard/``.
        total_steps: the last step of the run, for the remaining time.
        resume_step: the step that the run starts from.
        modality_names: modalities whose losses the console shows.
        run_config: the configuration that wandb records.
    """

    def __init__(
        self,
        run_dir: Path,
        logging: LoggingConfig,
        total_steps: int,
        resume_step: int,
        modality_names: tuple[str, ...],
        run_config: dict[str, Any],
    ) -> None:
        self.total_steps = total_steps
        self.modality_names = modality_names
        self.metrics = JsonLines(run_dir / METRICS, resume_step)
        self.routing = JsonLines(run_dir / ROUTING, resume_step)
        self.trackers = Trackers(run_dir, logging, resume_step, run_config)

    def training(self, values: dict[str, Any], routing: list[dict[str, Any]]) -> None:
        """Write a line of training metrics, and the routing statistics of its layers."""
        self._write(values)
        if routing:
            self.routing.write({"step": values["step"], "layers": routing})
        print(console_line(values, self.total_steps, self.modality_names), flush=True)

    def validation(self, step: int, values: dict[str, float]) -> None:
        """Write a line with the losses of the validation sets at ``step``."""
        self._write({"step": step, "time": time.time(), **values})
        losses = [f"{name.split('/')[1]} {value:.4f}" for name, value in values.items() if name.endswith("/loss")]
        print(f"step {step}  validation  {'  '.join(losses)}", flush=True)

    def retention(self, step: int, values: dict[str, float], change: str) -> None:
        """Write a line with how well text is predicted at ``step``; ``change`` says how that was at the start."""
        self._write({"step": step, "time": time.time(), **values})
        print(f"step {step}  text retention  {values[BITS_PER_BYTE]:.4f} bits per byte ({change})", flush=True)

    def _write(self, values: dict[str, Any]) -> None:
        self.metrics.write(values)
        scalars = {name: value for name, value in values.items() if name not in ("step", "time")}
        self.trackers.write(values["step"], scalars)

    def close(self) -> None:
        self.metrics.close()
        self.routing.close()
        self.trackers.close()


def console_line(values: dict[str, Any], total_steps: int, modality_names: tuple[str, ...]) -> str:
    """The console's line: step, loss in total and by modality, learning rate, speed, remaining time."""
    parts = [f"{name} {values[f'loss/{name}']:.4f}" for name in modality_names if f"loss/{name}" in values]
    step = values["step"]
    width = len(str(total_steps))
    left = (total_steps - step) * values["step_seconds"]
    return (
        f"step {step:>{width}}/{total_steps}  loss {_number(values, 'loss', 4)} ({', '.join(parts)})"
        f"  grad {_number(values, 'grad_norm', 3)}  lr {values['lr']:.2e}"
        f"  {values['tokens_per_second']:,.0f} tok/s  {values['step_seconds']:.3f} s/step  {_duration(left)} left"
    )


def _number(values: dict[str, Any], name: str, digits: int) -> str:
    """A value for the console; ``-`` if a line does not have it, because its steps were skipped."""
    return f"{values[name]:.{digits}f}" if name in values else "-"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def _step(line: bytes) -> float | None:
    """The step of a JSON line; None for a damaged line."""
    try:
        step = parse_json(line.decode())["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int | float) else None
