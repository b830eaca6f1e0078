"""Geometry of a routing map: layers by experts of one modality. The template draws it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_most.report.pools import Pools

ROW = 26.0
LABELS = 64.0
HEAD = 24.0
FOOT = 22.0
COLUMN = 56.0
"""Width of a column of numbers beside the map."""

_GAP = 14.0

_LETTER = 6.4
"""About the width of a letter of the map's labels."""


@dataclass(frozen=True)
class Counts:
    """What one modality's tokens did in one layer, summed over the intervals shown.

    Args:
        pairs: ``[E]`` (token, expert) pairs.
        score_sums: ``[E]`` scores summed over tokens; None when they were not recorded.
        tokens: number of tokens, 0 when not recorded.
        entropy: mean over tokens; None when not recorded.
    """

    pairs: list[int]
    score_sums: list[float] | None = None
    tokens: int = 0
    entropy: float | None = None


@dataclass(frozen=True)
class Cell:
    """One expert of one layer: the share of the modality's pairs.

    kind: ``used``, ``dead`` (may be chosen and was not), ``closed`` (may not be chosen) or ``leak`` (was all the same).
    """

    title: str
    x: float
    y: float
    width: float
    height: float
    share: float
    strength: float
    kind: str


@dataclass(frozen=True)
class RoutingMap:
    """One modality's heat map; coordinates are in a ``width`` x ``height`` view box.

    ``heads`` and ``columns`` are labels with their x, ``rows`` labels with their y, ``numbers`` a head, its right edge
    and a text for each row; ``borders`` are the x between pools.
    """

    modality: str
    num_experts: int
    color: int
    cells: list[Cell]
    rows: list[tuple[str, float]]
    numbers: list[tuple[str, float, list[str]]]
    borders: list[float]
    heads: list[tuple[str, float]]
    columns: list[tuple[str, float]]
    width: float
    height: float
    top: float
    bottom: float
    highest: float
    even: float | None
    show_values: bool

    @property
    def description(self) -> str:
        return (
            f"Routing map of {self.modality} tokens: {len(self.rows)} layers by {self.num_experts} experts,"
            f" largest share {self.highest:.1%}"
        )


def routing_map(modality: str, color: int, layers: dict[int, Counts], pools: Pools | None) -> RoutingMap | None:
    """Lay out the map of one modality's ``layers``; None when it had no pair.

    Without ``pools`` the experts stand in logical order, without borders, and nothing is known to be closed.
    """
    if not any(sum(counts.pairs) for counts in layers.values()):
        return None
    num_experts = len(next(iter(layers.values())).pairs)
    experts = pools.columns if pools else list(range(num_experts))
    choice = set(pools.choices[modality]) if pools else None
    pool_of = pools.pool_of() if pools else {}
    width = max(13.0, min(46.0, 420.0 / num_experts))
    shares = {layer: [count / max(1, sum(counts.pairs)) for count in counts.pairs] for layer, counts in layers.items()}
    highest = max(max(row) for row in shares.values())

    cells = []
    for row, (layer, counts) in enumerate(layers.items()):
        for column, expert in enumerate(experts):
            kind = _kind(counts.pairs[expert], choice is None or expert in choice)
            share = shares[layer][expert]
            cells.append(
                Cell(
                    title=_title(layer, expert, pool_of.get(expert), kind, counts, share),
                    x=round(LABELS + column * width, 2),
                    y=HEAD + row * ROW,
                    width=round(width, 2),
                    height=ROW,
                    share=share,
                    strength=round(share / highest, 3),
                    kind=kind,
                )
            )
    right = LABELS + num_experts * width
    numbers = _numbers(layers, choice, right)
    edges, heads = [LABELS], []
    for name, mine in pools.experts.items() if pools else ():
        edges.append(edges[-1] + len(mine) * width)
        full = f"{name} experts"
        heads.append((full if len(full) * _LETTER <= edges[-1] - edges[-2] else name, (edges[-2] + edges[-1]) / 2))
    every = 1 if width >= 18 else 8
    return RoutingMap(
        modality=modality,
        num_experts=num_experts,
        color=color,
        cells=cells,
        rows=[(f"layer {layer}", HEAD + (row + 0.5) * ROW) for row, layer in enumerate(layers)],
        numbers=numbers,
        borders=edges[1:-1],
        heads=heads,
        columns=[
            (str(expert), LABELS + (column + 0.5) * width)
            for column, expert in enumerate(experts)
            if column % every == 0
        ],
        width=numbers[-1][1],
        height=HEAD + len(layers) * ROW + FOOT,
        top=HEAD,
        bottom=HEAD + len(layers) * ROW,
        highest=highest,
        even=1 / len(choice) if choice else None,
        show_values=width >= 30,
    )


def max_over_mean(loads: Sequence[int]) -> float | None:
    """Load of the busiest expert over the mean; None when nothing was routed."""
    return max(loads) * len(loads) / sum(loads) if sum(loads) else None


def _numbers(layers: dict[int, Counts], choice: set[int] | None, left: float) -> list[tuple[str, float, list[str]]]:
    """Columns beside the map; those that nothing was recorded for are left out."""
    loads = {
        layer: [count for expert, count in enumerate(counts.pairs) if choice is None or expert in choice]
        for layer, counts in layers.items()
    }
    ratios = [max_over_mean(mine) for mine in loads.values()]
    columns = [("max/mean", [f"{ratio:.2f}×" if ratio else "–" for ratio in ratios])]
    if choice is not None:
        columns.append(("dead", [str(mine.count(0)) if sum(mine) else "–" for mine in loads.values()]))
    entropies = [counts.entropy for counts in layers.values()]
    if any(entropy is not None for entropy in entropies):
        columns.append(("entropy", ["–" if entropy is None else f"{entropy:.2f}" for entropy in entropies]))
    return [(head, left + _GAP + (index + 1) * COLUMN, texts) for index, (head, texts) in enumerate(columns)]


def _kind(pairs: int, is_open: bool) -> str:
    if is_open:
        return "used" if pairs else "dead"
    return "leak" if pairs else "closed"


def _title(layer: int, expert: int, pool: str | None, kind: str, counts: Counts, share: float) -> str:
    where = f"layer {layer}, expert {expert}" + (f" ({pool})" if pool else "")
    if kind == "closed":
        return f"{where}: not open to this modality"
    text = f"{where}{', outside the choice' if kind == 'leak' else ''}: {share:.2%} ({counts.pairs[expert]:,} pairs)"
    if counts.score_sums is not None and counts.tokens:
        text += f", mean score {counts.score_sums[expert] / counts.tokens:.3g}"
    return text
