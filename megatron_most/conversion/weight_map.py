"""The rules of a weight table, and the blocks of equal rows that they expand to for one model.

A rule says which foreign tensors make up a native tensor. The formats differ only in where rows are: gate above up,
queries, keys and values by query group, experts along an axis, ids. So a rule expands to blocks: consecutive rows of a
foreign tensor and the native region that equals them. The same blocks serve import and export.

"Native" is this project's checkpoint, "foreign" that of the other format.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_most.checkpointing.regions import Region
from megatron_most.config import RunConfig
from megatron_most.conversion.native import Shapes, is_expert_bias, native_shapes
from megatron_most.moe import ExpertGroups

_NO_LAYER = -1
"""Number of the layer in the expansion of a rule for tensors outside layers."""

MAX_ELEMENTS = 1 << 24
"""Largest region that is written at once. Larger ones are cut, so that at most 64 MB of fp32 are in memory."""


@dataclass(frozen=True)
class Rule:
    """How one kind of native tensor is made of foreign ones.

    Args:
        native: key, with ``{layer}``.
        foreign: names, with ``{layer}`` and, if each expert has its own tensor, ``{expert}``. Several tensors are
            stacked by rows.
        layers: the layers that have the tensor: ``all``, ``dense``, ``moe``, or ``none`` for a tensor outside layers;
            ``codebooks`` for one tensor per codebook, with ``{codebook}`` in its names.
        along: what indexes the native tensor: ``rows`` (as in the foreign one), ``experts`` (its first axis),
            ``expert_rows`` (one row per expert), ``expert_entries`` (a row per modality with one number per expert; the
            foreign one is a vector), ``matrices`` (the foreign one stacks them by rows) or ``ids``.
        rounds: how often the stacking repeats: each foreign tensor is cut into that many equal parts, which alternate
            (queries, keys and values of one query group after another).
        parts: rows that each foreign tensor gives to a round; by default all give the same number.
        scale: native = scale x foreign.
        when: whether a model has the tensor.
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
    """The foreign expert that a native one corresponds to. Export ignores a ``copy``, which training may change."""

    expert: int
    copy: bool = False


@dataclass(frozen=True)
class IdRun:
    """The ``count`` native ids from ``native`` are the foreign ids from ``foreign``."""

    native: int
    foreign: int
    count: int


@dataclass(frozen=True)
class Correspondence:
    """Which experts and ids of the two models correspond.

    Args:
        experts: for each MoE layer and logical expert, its origin; None if it is not in the foreign model.
        ids: the ids that both models have.
    """

    experts: tuple[tuple[Origin | None, ...], ...]
    ids: tuple[IdRun, ...]


@dataclass(frozen=True)
class Block:
    """``region`` of a native tensor equals ``scale`` times the rows of the foreign tensor ``name`` from ``row``.

    The foreign tensor has as many axes as the native one, but at most ``axes``: none for experts or modalities.
    """

    region: Region
    name: str
    row: int
    scale: float = 1.0
    copy: bool = False
    axes: int = 2

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the foreign rows: the region's, without an axis of experts or modalities."""
        return self.region.sizes[-self.axes :]

    @property
    def rows(self) -> int:
        return self.shape[0]


def all_blocks(rules: Sequence[Rule], config: RunConfig, both: Correspondence) -> list[Block]:
    """The blocks that ``rules`` expand to for the model of ``config``, as few as possible, in forward order."""
    shapes = native_shapes(config)
    dense = config.model.first_k_dense_replace
    layers: dict[str, Iterable[int]] = {
        "none": [_NO_LAYER],
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
    """The parts of the tensors of ``shapes`` that ``regions`` leave out.

    Raises:
        ValueError: two regions overlap.
    """
    runs: dict[tuple[str, tuple[int, ...]], list[tuple[int, int]]] = {}
    for region in regions:
        axis = row_axis(region.key, shapes[region.key])
        run = (region.offsets[axis], region.offsets[axis] + region.sizes[axis])
        runs.setdefault((region.key, region.offsets[:axis]), []).append(run)
    left = []
    for key, shape in shapes.items():
        axis = row_axis(key, shape)
        for place in _places(key, shape):
            row = 0
            for start, stop in [*sorted(runs.get((key, place), [])), (shape[axis], shape[axis])]:
                if start < row:
                    raise ValueError(f"{key}{list(place)}: row {start} is written twice")
                if start > row:
                    left.append(_rows(key, place, row, start - row, shape))
                row = stop
    return left


def _rule_blocks(rule: Rule, config: RunConfig, shapes: Shapes, both: Correspondence, layer: int) -> Iterator[Block]:
    """The blocks of one rule for one ``layer`` or, if the rule is about codebooks, for the codebook of that number."""
    key = rule.native.format(layer=layer, codebook=layer)
    shape, scale = shapes[key], rule.scale(config)
    names = [name.replace("{layer}", str(layer)).replace("{codebook}", str(layer)) for name in rule.foreign]
    origins = both.experts[layer - config.model.first_k_dense_replace] if rule.layers == "moe" else ()
    if rule.along == "ids":
        for run in both.ids:
            yield Block(_rows(key, (), run.native, run.count, shape), names[0], run.foreign, scale)
    elif rule.along == "matrices":
        for matrix, place in enumerate(_places(key, shape)):
            block = Block(_rows(key, place, 0, shape[row_axis(key, shape)], shape), names[0], 0, scale)
            yield dataclasses.replace(block, row=matrix * block.rows)
    elif rule.along == "expert_rows":
        for place in _places(key, shape):
            for first, origin, count in _expert_runs(origins):
                # The foreign router serves all modalities: export reads the first modality's rows.
                copy = origin.copy or any(place)
                yield Block(_rows(key, place, first, count, shape), names[0], origin.expert, scale, copy)
    elif rule.along == "expert_entries":
        for modality, chosen in enumerate(_origins_of_choices(config, origins)):
            for first, origin, count in _expert_runs(chosen):
                region = _rows(key, (modality,), first, count, shape)
                yield Block(region, names[0], origin.expert, scale, origin.copy, axes=1)
    else:
        experts: list[tuple[tuple[int, ...], Origin]] = [((), Origin(0))]
        if rule.along == "experts":
            experts = [((expert,), origin) for expert, origin in enumerate(origins) if origin is not None]
        for index, origin in experts:
            own = [name.replace("{expert}", str(origin.expert)) for name in names]
            for name, foreign_row, row, count in _stacked(rule, config, own, shape[row_axis(key, shape)]):
                yield Block(_rows(key, index, row, count, shape), name, foreign_row, scale, origin.copy)


def _origins_of_choices(config: RunConfig, origins: Sequence[Origin | None]) -> Iterator[list[Origin | None]]:
    """For each modality, the origins of the experts that it may choose; None for the others.

    An expert that several modalities may choose has an entry for each. Export reads that of the first.
    """
    seen: set[int] = set()
    for choice in ExpertGroups.from_config(config.model.moe).choices:
        own: list[Origin | None] = [None] * len(origins)
        for expert in choice:
            origin = origins[expert]
            own[expert] = None if origin is None else Origin(origin.expert, origin.copy or expert in seen)
        seen.update(choice)
        yield own


def _stacked(rule: Rule, config: RunConfig, names: list[str], rows: int) -> Iterator[tuple[str, int, int, int]]:
    """``(name, foreign row, native row, count)`` of each part of a stack that has ``rows`` rows."""
    rounds = rule.rounds(config)
    parts = rule.parts(config) or (rows // len(names) // rounds,) * len(names)
    row = 0
    for turn in range(rounds):
        for name, count in zip(names, parts, strict=True):
            yield name, turn * count, row, count
            row += count


def _expert_runs(origins: Sequence[Origin | None]) -> Iterator[tuple[int, Origin, int]]:
    """``(first native expert, its origin, count)`` of experts that are consecutive in both models."""
    start = 0
    while start < len(origins):
        first, count = origins[start], 1
        if first is not None:
            rest = origins[start + 1 :]
            while count <= len(rest) and rest[count - 1] == dataclasses.replace(first, expert=first.expert + count):
                count += 1
            yield start, first, count
        start += count


def cut(region: Region, max_elements: int = MAX_ELEMENTS) -> list[Region]:
    """``region``, cut by rows into regions of at most ``max_elements``, but at least one row."""
    axis = row_axis(region.key, region.sizes)
    row, count = region.offsets[axis], region.sizes[axis]
    most = max(1, max_elements // math.prod(region.sizes[axis + 1 :]))
    return [
        _rows(region.key, region.offsets[:axis], start, min(most, row + count - start), region.sizes)
        for start in range(row, row + count, most)
    ]


def cut_block(block: Block) -> list[Block]:
    """A block, cut like its region by :func:`cut`."""
    axis = row_axis(block.region.key, block.region.sizes)
    start = block.region.offsets[axis]
    return [
        dataclasses.replace(block, region=region, row=block.row + region.offsets[axis] - start)
        for region in cut(block.region)
    ]


def _rows(key: str, place: tuple[int, ...], row: int, count: int, shape: tuple[int, ...]) -> Region:
    """``count`` rows from ``row`` of a tensor of ``shape``, at index ``place`` of an axis before the rows, if any."""
    columns = shape[row_axis(key, shape) + 1 :]
    return Region(key, (*place, row, *(0 for _ in columns)), (*(1 for _ in place), count, *columns))


def _places(key: str, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The indices of the axis before the rows, each as a tuple; one empty tuple if there is no such axis."""
    return [(index,) for index in range(shape[0])] if row_axis(key, shape) else [()]


def row_axis(key: str, shape: tuple[int, ...]) -> int:
    """The axis of a native tensor that is cut: of its rows, the second to last, or the only one of a vector.

    Expert biases are vectors, one for each modality.
    """
    return len(shape) - 1 if is_expert_bias(key) else max(0, len(shape) - 2)
