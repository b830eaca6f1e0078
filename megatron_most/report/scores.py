"""Scores of suites that have no word error rate: spoken language modeling, questions, text."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_most.report.run_files import RunFiles, number


@dataclass(frozen=True)
class SuiteScore:
    """One suite on one set, as text: a share in percent, or bits per byte."""

    suite: str
    set_name: str
    metric: str
    value: str
    interval: str
    samples: str
    failed: int


def suite_scores(run: RunFiles) -> list[SuiteScore]:
    """Every result of ``evaluation/`` that is no word error rate, in the order of its file's name."""
    found = []
    for name, result in run.evaluation.items():
        value = number(result.get("score"))
        if value is None or "wer" in result:
            continue
        metric, ends = str(result.get("metric", "score")), result.get("interval")
        limits = [number(end) for end in ends] if isinstance(ends, list) and len(ends) == 2 else []
        known = [shown(metric, end) for end in limits if end is not None]
        count, failed = number(result.get("num_samples")), number(result.get("num_failed"))
        found.append(
            SuiteScore(
                str(result.get("suite", name)),
                str(result.get("set", "")),
                metric.replace("_", " "),
                shown(metric, value),
                f"{known[0]} to {known[1]}" if len(known) == 2 else "",
                "" if count is None else f"{int(count):,}",
                int(failed or 0),
            )
        )
    return found


def shown(metric: str, value: float) -> str:
    return f"{value:.4f}" if metric == "bits_per_byte" else f"{value:.1%}"
