"""The charts of a run's metrics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from megatron_most.report.charts import LineChart, Marker, Series, line_chart
from megatron_most.report.run_files import number
from megatron_most.report.utilization import FLOPS, MFU

_TASKS = {
    "asr": "ASR",
    "tts": "TTS",
    "text_lm": "text LM",
    "speech_lm": "speech LM",
    "interleaved": "interleaved",
    "chat": "chat",
}
_MARKERS: tuple[Marker, ...] = ("circle", "diamond", "square")
PALETTE = 8
"""Number of colors: 0 and 1 are those of text and audio, 2 is gray, those of tasks start at 3."""
_GREY = 2
_MODALITIES = (0, 1, 7, 6, 4)
MEMORY = "max_memory_bytes"
RETENTION = "retention/bits_per_byte"


def modality_color(index: int) -> int:
    """Color of a modality in all charts and maps."""
    return _MODALITIES[index % len(_MODALITIES)]


def points_of(metrics: Iterable[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of every finite value of ``key``, ascending; of two values at one step, the later line counts."""
    return sorted({line["step"]: value for line in metrics if (value := number(line.get(key))) is not None}.items())


def loss_charts(metrics: list[dict[str, Any]], modalities: Sequence[str]) -> list[LineChart]:
    """Losses by modality, by task and by codebook, and how well text is still predicted.

    Validation sets are dashed, in the color of their task.
    """
    keys = dict.fromkeys(key for line in metrics for key in line)
    modality = [Series("all targets", points_of(metrics, "loss"), _GREY)]
    modality += [
        Series(name, points_of(metrics, f"loss/{name}"), modality_color(index)) for index, name in enumerate(modalities)
    ]

    task_colors = {task: (3 + index) % PALETTE for index, task in enumerate(_TASKS)}
    tasks = [Series(label, points_of(metrics, f"loss/{task}"), task_colors[task]) for task, label in _TASKS.items()]
    validation: list[Series] = []
    sets_of: dict[str, int] = {}
    for key in keys:
        parts = key.split("/")
        if len(parts) != 3 or parts[0] != "validation" or parts[2] != "loss":
            continue
        task = next((task for task in _TASKS if parts[1] == task or parts[1].endswith(f"_{task}")), "")
        index = sets_of[task] = sets_of.get(task, -1) + 1
        color = task_colors.get(task, (6 + index) % PALETTE)
        label, marker = f"{parts[1]} (validation)", _MARKERS[index % len(_MARKERS)]
        validation.append(Series(label, points_of(metrics, key), color, dash=True, marker=marker))

    prefix = "loss/codebook_"
    codebooks = sorted((key for key in keys if key.startswith(prefix)), key=lambda key: (len(key), key))
    by_codebook = [
        Series(f"codebook {key.removeprefix(prefix)}", points_of(metrics, key), (5 + index) % PALETTE)
        for index, key in enumerate(codebooks)
    ]
    charts = (
        line_chart("Loss by modality", modality),
        line_chart("Loss by task", tasks + validation),
        line_chart("Cross entropy by codebook", by_codebook),
        line_chart("Text retention", [Series("bits per byte", points_of(metrics, RETENTION), 0, marker="circle")]),
    )
    return [chart for chart in charts if chart]


def training_charts(metrics: list[dict[str, Any]]) -> list[LineChart]:
    """Learning rate, gradient norms, throughput, utilization and memory."""
    parts = sorted({key for line in metrics for key in line if key.startswith("grad_norm/")})
    by_part = [
        Series(key.removeprefix("grad_norm/"), points_of(metrics, key), index % PALETTE, dash=index >= PALETTE)
        for index, key in enumerate(parts)
    ]
    charts = (
        line_chart("Learning rate", [Series("learning rate", points_of(metrics, "lr"), 0)], from_zero=True),
        line_chart("Gradient norm, before clipping", [Series("gradient norm", points_of(metrics, "grad_norm"), 4)]),
        line_chart("Gradient norm of each part, before clipping", by_part),
        line_chart(
            "Throughput",
            [Series("tokens per second", points_of(metrics, "tokens_per_second"), 3)],
            unit="tokens/s",
            from_zero=True,
        ),
        line_chart("Model FLOPs utilization (MFU)", [Series("MFU", points_of(metrics, MFU), 6)], "%", from_zero=True),
        line_chart("Model FLOP/s", [Series("FLOP/s", points_of(metrics, FLOPS), 6)], "FLOP/s", from_zero=True),
        line_chart(
            "Peak memory of rank 0",
            [Series("memory", [(step, size / (1 << 30)) for step, size in points_of(metrics, MEMORY)], 7)],
            unit="GiB",
            from_zero=True,
        ),
        line_chart(
            "Time of a step",
            [Series("seconds per step", points_of(metrics, "step_seconds"), 5)],
            unit="s",
            from_zero=True,
        ),
    )
    return [chart for chart in charts if chart]
