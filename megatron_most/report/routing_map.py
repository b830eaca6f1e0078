"""Geometry of a routing map: layers by experts, for one modality. The template draws it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_most.report.pools import Pools
from megatron_most.report.routing_counts import Counts

ROW = 26.0
LABELS = 64.0
HEAD = 24.0
FOOT = 22.0
COLUMN = 56.0
"""Width of a column of numbers beside the map."""

_GAP = 14.0

_LETTER = 6.4
"""About the width of a letter of the map's labels."""

_LABELED_EVERY = 8
"""Where columns are narrow, only every eighth expert is labeled."""


@dataclass(frozen=True)
class Cell:
    """One expert of one layer.

    Args:
        share: of the modality's pairs in that layer.
        strength: the share over the largest of the map.
        kind: ``used``; ``dead`` (open to the modality, never chosen); ``closed`` (not open to it); ``leak`` (not open
            to it, but chosen).
    """

    layer: int
    expert: int

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

    Args:
        rows: labels of the layers, with their y.
        numbers: columns of numbers beside the map: head, right edge, and a text for each row.
        borders: x between pools.
        heads: names of the pools above the map, with their x.
        columns: labels of the experts below the map, with their x.
        highest: the largest share.
        even: the share of every expert of the choice if the load were even; None if the choice is unknown.
        show_values: whether cells have room for their share.
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
    def table(self) -> dict[str, list]:
        """The map's numbers, for a CSV file."""
        rows = [[cell.layer, cell.expert, cell.kind, float(f"{cell.share:.6g}")] for cell in self.cells]
        return {"columns": ["layer", "expert", "kind", "share of pairs"], "rows": rows}

    @property
    def description(self) -> str:
        return (
            f"Routing map of {self.modality} tokens: {len(self.rows)} layers by {self.num_experts} experts,"
            f" largest share {self.highest:.1%}"
        )


def routing_map(modality: str, color: int, layers: dict[int, Counts], pools: Pools | None) -> RoutingMap:
    """Lay out the map of one modality, which has pairs in some of its ``layers``.

    Without ``pools`` the experts stand in logical order without borders, and no expert is known to be closed.
    """
    num_experts = len(next(iter(layers.values())).pairs)
    experts = pools.columns if pools else list(range(num_experts))
    choice = set(pools.choices[modality]) if pools else None
    width = max(13.0, min(46.0, 420.0 / num_experts))
    cells = _cells(layers, experts, choice, pools.pool_of() if pools else {}, width)
    numbers = _numbers(layers, choice, LABELS + num_experts * width)
    heads, borders = _pool_heads(pools, width) if pools else ([], [])
    bottom = HEAD + len(layers) * ROW
    return RoutingMap(
        modality=modality,
        num_experts=num_experts,
        color=color,
        cells=cells,
        rows=[(f"layer {layer}", HEAD + (row + 0.5) * ROW) for row, layer in enumerate(layers)],
        numbers=numbers,
        borders=borders,
        heads=heads,
        columns=[
            (str(expert), LABELS + (column + 0.5) * width)
            for column, expert in enumerate(experts)
            if width >= 18 or column % _LABELED_EVERY == 0
        ],
        width=numbers[-1][1],
        height=bottom + FOOT,
        top=HEAD,
        bottom=bottom,
        highest=max(cell.share for cell in cells),
        even=1 / len(choice) if choice else None,
        show_values=width >= 30,
    )


def _cells(
    layers: dict[int, Counts], experts: list[int], choice: set[int] | None, pool_of: dict[int, str], width: float
) -> list[Cell]:
    """A row of cells for each layer, one for each of ``experts`` in that order."""
    shares = {layer: [count / max(1, sum(counts.pairs)) for count in counts.pairs] for layer, counts in layers.items()}
    highest = max(max(row) for row in shares.values())
    cells = []
    for row, (layer, counts) in enumerate(layers.items()):
        for column, expert in enumerate(experts):
            kind = _kind(counts.pairs[expert], choice is None or expert in choice)
            share = shares[layer][expert]
            cells.append(
                Cell(
                    layer=layer,
                    expert=expert,
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
    return cells


def _pool_heads(pools: Pools, width: float) -> tuple[list[tuple[str, float]], list[float]]:
    """Names of the pools with their x, shortened to their columns, and the x of the borders between them."""
    heads, edge, borders = [], LABELS, []
    for name, experts in pools.experts.items():
        right = edge + len(experts) * width
        full = f"{name} experts"
        heads.append((full if len(full) * _LETTER <= right - edge else name, (edge + right) / 2))
        borders.append(right)
        edge = right
    return heads, borders[:-1]


def max_over_mean(loads: Sequence[int]) -> float | None:
    """Load of the busiest expert over the mean; None when nothing was routed."""
    return max(loads) * len(loads) / sum(loads) if sum(loads) else None


def _numbers(layers: dict[int, Counts], choice: set[int] | None, left: float) -> list[tuple[str, float, list[str]]]:
    """Columns of numbers beside the map, those that were recorded."""
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
