"""What the lines of ``routing.jsonl`` say: which experts the tokens of each modality went to.

Shape letters: E logical experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_most.report.run_files import RunFiles, number


@dataclass(frozen=True)
class Counts:
    """Tokens of one modality in one layer, over one or more logged intervals.

    Args:
        pairs: ``[E]`` (token, expert) pairs.
        score_sums: ``[E]`` scores summed over ``tokens``; None if they were not recorded.
        tokens: 0 if they were not recorded.
        entropy: mean over tokens; None if it was not recorded.
    """

    pairs: list[int]
    score_sums: list[float] | None = None
    tokens: int = 0
    entropy: float | None = None


Layers = dict[int, dict[str, Counts]]
"""Layer number -> modality -> counts."""


@dataclass(frozen=True)
class Interval:
    """Counts of the steps up to ``step``, from the line before."""

    step: int
    layers: Layers

    def all_counts(self) -> Iterator[Counts]:
        for by_modality in self.layers.values():
            yield from by_modality.values()


def read_intervals(run: RunFiles) -> list[Interval]:
    """Every line with counts of the run's experts; the run gets a note if lines are left out."""
    intervals = [Interval(int(line["step"]), _layers(line, run.modalities)) for line in run.routing]
    num_experts = max((len(counts.pairs) for one in intervals for counts in one.all_counts()), default=0)
    whole = []
    for one in intervals:
        layers = {layer: counts for layer, counts in one.layers.items() if _all_count(counts, num_experts)}
        if layers:
            whole.append(Interval(one.step, layers))
    if len(whole) < len(intervals):
        run.notes.append(f"{len(intervals) - len(whole)} lines of routing.jsonl hold no counts and are left out.")
    return whole


def num_outside(run: RunFiles) -> int:
    """Pairs whose expert was outside of the token's choice, over the whole run."""
    return sum(int(number(layer.get("outside_group")) or 0) for line in run.routing for layer in _entries(line))


def total(intervals: Iterable[Interval]) -> Layers:
    """Several intervals as one."""
    found: dict[int, dict[str, list[Counts]]] = {}
    for one in intervals:
        for layer, by_modality in one.layers.items():
            for name, counts in by_modality.items():
                found.setdefault(layer, {}).setdefault(name, []).append(counts)
    return {layer: {name: _sum(counts) for name, counts in found[layer].items()} for layer in sorted(found)}


def _sum(counts: Sequence[Counts]) -> Counts:
    scored = [(one.score_sums, one.tokens) for one in counts if one.score_sums is not None]
    entropies = [(one.entropy * one.tokens, one.tokens) for one in counts if one.entropy is not None and one.tokens]
    entropy_tokens = sum(tokens for _, tokens in entropies)
    return Counts(
        pairs=[sum(column) for column in zip(*(one.pairs for one in counts), strict=True)],
        score_sums=[sum(column) for column in zip(*(sums for sums, _ in scored), strict=True)] if scored else None,
        tokens=sum(tokens for _, tokens in scored),
        entropy=sum(value for value, _ in entropies) / entropy_tokens if entropy_tokens else None,
    )


def _all_count(by_modality: dict[str, Counts], num_experts: int) -> bool:
    return all(len(counts.pairs) == num_experts for counts in by_modality.values())


def _entries(line: dict[str, Any]) -> list[dict[str, Any]]:
    """The layers of a line, as they were written."""
    layers = line.get("layers")
    return [layer for layer in layers if isinstance(layer, dict)] if isinstance(layers, list) else []


def _layers(line: dict[str, Any], modalities: Sequence[str]) -> Layers:
    found: Layers = {}
    for entry in _entries(line):
        pairs = entry.get("pairs")
        if not isinstance(pairs, dict):  # older runs have the counts beside the layer's number, and no statistics
            pairs = {name: entry.get(name) for name in modalities}
        if pairs and all(_is_numbers(row) and row for row in pairs.values()):
            layer = int(number(entry.get("layer")) or 0)
            found[layer] = {str(name): _counts(entry, name, row) for name, row in pairs.items()}
    return found


def _counts(entry: dict[str, Any], name: str, pairs: list[float]) -> Counts:
    def recorded(key: str) -> Any:
        value = entry.get(key)
        return value.get(name) if isinstance(value, dict) else None

    tokens, scores = int(number(recorded("tokens")) or 0), recorded("mean_score")
    has_scores = _is_numbers(scores) and len(scores) == len(pairs)
    return Counts(
        pairs=[int(count) for count in pairs],
        score_sums=[score * tokens for score in scores] if has_scores else None,
        tokens=tokens,
        entropy=number(recorded("entropy")),
    )


def _is_numbers(row: Any) -> bool:
    return isinstance(row, list) and all(number(value) is not None for value in row)
