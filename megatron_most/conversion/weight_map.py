"""Tables of weight maps, and what they come to for one model: blocks of rows that are the same here and there.

A rule says which tensors of another format make up a native one. Every difference between the formats is one of where
rows stand: gate above up, queries, keys and values by query group, experts along an axis of one tensor, ids. So a rule
becomes blocks, each a run of rows of a foreign tensor and the region of the native one that equals it, and the same
blocks serve import and export.

"Native" is this project's checkpoint, "foreign" the other format's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_most.checkpointing.region_io import Region
from megatron_most.config import RunConfig
from megatron_most.conversion.native import Shapes, native_shapes

MAX_ELEMENTS = 1 << 24
"""Of a region that is written: larger ones are cut, so that 64 MB of fp32 is all that is in memory at a time."""


@dataclass(frozen=True)
class Rule:
    """How one kind of native tensor corresponds to foreign ones.

    Args:
        native: key, with ``{layer}``.
        foreign: names, with ``{layer}`` and, where an expert is a tensor of its own, ``{expert}``. Several are stacked
            by rows.
        layers: the layers it is about: ``all``, ``dense``, ``moe``, or ``none`` for a tensor outside of layers;
            ``codebooks`` for one of each codebook, with ``{codebook}`` in the names.
        along: what the native tensor is indexed by: ``rows`` (as the foreign one), ``experts`` (an expert for each
            index of its first axis), ``expert_rows`` (a row for each expert), ``matrices`` (where it has three axes,
            the foreign one has its matrices one below the other) or ``ids``.
        rounds: how often the stacking goes round: each foreign tensor is cut into that many equal parts, and the parts
            alternate (queries, keys and values of one query group after another).
        parts: rows that each foreign tensor gives to a round; equal parts of all rows by default.
        scale: native = scale x foreign.
        when: for models of which it holds.
    """

    native: str
    foreign: tuple[str, ...]
    layers: str = "all"
    along: str = "rows"
    rounds: Callable[[RunConfig], int] = lambda config: 1
    scale: Callable[[RunConfig], float] = lambda config: 1.0
    parts: Callable[[RunConfig], tuple[int, ...]] = lambda config: ()
    when: Callable[[RunConfig], bool] = lambda config: True


@dataclass(frozen=True)
class Origin:
    """The foreign expert that a native one corresponds to. A ``copy`` may go its own way: export does not read it."""

    expert: int
    copy: bool = False


@dataclass(frozen=True)
class IdRun:
    """``count`` ids from ``native`` on are the foreign ids from ``foreign`` on."""

    native: int
    foreign: int
    count: int


@dataclass(frozen=True)
class Correspondence:
    """Which experts and ids of the two models belong together.

    Args:
        experts: for each MoE layer and logical expert its origin; None where the foreign model has none.
        ids: the ids that both have.
    """

    experts: tuple[tuple[Origin | None, ...], ...]
    ids: tuple[IdRun, ...]


@dataclass(frozen=True)
class Block:
    """``region`` of a native tensor equals ``scale`` times the rows of ``name`` from ``row`` on."""

    region: Region
    name: str
    row: int
    scale: float = 1.0
    copy: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the foreign rows: the region's without the axis of experts or modalities."""
        return tuple(size for axis, size in enumerate(self.region.sizes) if axis >= len(self.region.sizes) - 2)

    @property
    def rows(self) -> int:
        return self.shape[0]


def all_blocks(rules: Sequence[Rule], config: RunConfig, both: Correspondence) -> list[Block]:
    """What ``rules`` come to for the model of ``config``, in the order of its forward pass, as few as possible."""
    shapes = native_shapes(config)
    dense = config.model.first_k_dense_replace
    layers = {
        "none": [None],
        "all": range(config.model.num_layers),
        "dense": range(dense),
        "moe": range(dense, config.model.num_layers),
        "codebooks": range(config.vocab.num_codebooks if config.vocab.codec_layout.uses_side_codes else 0),
    }
    blocks = [
        block
        for rule in rules
        if rule.when(config)
        for layer in layers[rule.layers]
        for block in _rule_blocks(rule, config, shapes, both, layer)
    ]
    order = {key: place for place, key in enumerate(shapes)}
    return sorted(blocks, key=lambda block: order[block.region.key])


def open_regions(shapes: Shapes, regions: Iterable[Region]) -> list[Region]:
    """What of the tensors of ``shapes`` the ``regions`` leave out.

    Raises:
        ValueError: two regions overlap.
    """
    runs: dict[tuple[str, tuple[int, ...]], list[tuple[int, int]]] = {}
    for region in regions:
        axis = _row_axis(shapes[region.key])
        run = (region.offsets[axis], region.offsets[axis] + region.sizes[axis])
        runs.setdefault((region.key, region.offsets[:axis]), []).append(run)
    left = []
    for key, shape in shapes.items():
        axis = _row_axis(shape)
        for lead in range(shape[0]) if axis else [None]:
            place = () if lead is None else (lead,)
            row = 0
            for start, stop in [*sorted(runs.get((key, place), [])), (shape[axis], shape[axis])]:
                if start < row:
                    raise ValueError(f"{key}{list(place)}: row {start} is written twice")
                if start > row:
                    left.append(_rows(key, place, row, start - row, shape))
                row = stop
    return left


def _rule_blocks(
    rule: Rule, config: RunConfig, shapes: Shapes, both: Correspondence, layer: int | None
) -> Iterator[Block]:
    key = rule.native.format(layer=layer, codebook=layer)
    shape, scale = shapes[key], rule.scale(config)
    names = [name.replace("{layer}", str(layer)).replace("{codebook}", str(layer)) for name in rule.foreign]
    origins = () if rule.layers != "moe" else both.experts[layer - config.model.first_k_dense_replace]
    if rule.along == "ids":
        for run in both.ids:
            yield Block(_rows(key, (), run.native, run.count, shape), names[0], run.foreign, scale)
    elif rule.along == "matrices":
        rows = shape[_row_axis(shape)]
        for lead in range(shape[0]) if len(shape) == 3 else [None]:
            place = () if lead is None else (lead,)
            yield Block(_rows(key, place, 0, rows, shape), names[0], (lead or 0) * rows, scale)
    elif rule.along == "expert_rows":
        for lead in range(shape[0]) if len(shape) == 3 else [None]:
            place = () if lead is None else (lead,)
            for first, origin, count in _expert_runs(origins):
                # One matrix serves all modalities there: the first modality's is the one that export reads.
                copy = origin.copy or bool(lead)
                yield Block(_rows(key, place, first, count, shape), names[0], origin.expert, scale, copy)
    else:
        pairs = enumerate(origins) if rule.along == "experts" else [(None, Origin(0))]
        for expert, origin in pairs:
            if origin is None:
                continue
            place = () if expert is None else (expert,)
            own = [name.replace("{expert}", str(origin.expert)) for name in names]
            for name, foreign_row, row, count in _stacked(rule, config, own, shape[_row_axis(shape)]):
                yield Block(_rows(key, place, row, count, shape), name, foreign_row, scale, origin.copy)


def _stacked(rule: Rule, config: RunConfig, names: list[str], rows: int) -> Iterator[tuple[str, int, int, int]]:
    """``(name, foreign row, native row, count)`` of each part of a stack of ``rows`` rows."""
    rounds = rule.rounds(config)
    parts = rule.parts(config) or (rows // len(names) // rounds,) * len(names)
    row = 0
    for turn in range(rounds):
        for name, count in zip(names, parts, strict=True):
            yield name, turn * count, row, count
            row += count


def _expert_runs(origins: Sequence[Origin | None]) -> Iterator[tuple[int, Origin, int]]:
    """``(first native expert, its origin, count)`` of each run of experts that follow one another in both models."""
    start = 0
    for place in range(1, len(origins) + 1):
        previous = origins[place - 1]
        follows = (
            place < len(origins)
            and previous is not None
            and origins[place] == dataclasses.replace(previous, expert=previous.expert + 1)
        )
        if not follows:
            if origins[start] is not None:
                yield start, origins[start], place - start
            start = place


def cut(region: Region, max_elements: int = MAX_ELEMENTS) -> list[Region]:
    """``region`` by rows, in regions of at most ``max_elements``, and at least a row."""
    axis = _row_axis(region.sizes)
    row, count = region.offsets[axis], region.sizes[axis]
    most = max(1, max_elements // math.prod(region.sizes[axis + 1 :]))
    return [
        _rows(region.key, region.offsets[:axis], start, min(most, row + count - start), region.sizes)
        for start in range(row, row + count, most)
    ]


def cut_block(block: Block) -> list[Block]:
    """A block in blocks of the regions that :func:`cut` gives."""
    axis = _row_axis(block.region.sizes)
    start = block.region.offsets[axis]
    return [
        dataclasses.replace(block, region=region, row=block.row + region.offsets[axis] - start)
        for region in cut(block.region)
    ]


def _rows(key: str, place: tuple[int, ...], row: int, count: int, shape: tuple[int, ...]) -> Region:
    """``count`` rows from ``row`` on of a tensor of ``shape``, at ``place`` on the axis before them."""
    columns = shape[_row_axis(shape) + 1 :]
    return Region(key, (*place, row, *(0 for _ in columns)), (*(1 for _ in place), count, *columns))


def _row_axis(shape: tuple[int, ...]) -> int:
    """Rows are the last axis but one, and the elements of a vector."""
    return max(0, len(shape) - 2)
