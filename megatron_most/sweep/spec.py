"""The file that describes a sweep, and the variants that its axes give."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf

from megatron_most.config.load import check_shape, read_yaml
from megatron_most.config.rules import require, require_not_negative, require_one_of, require_positive
from megatron_most.errors import ConfigError
from megatron_most.evaluation.normalization import NORMALIZERS


@dataclass
class BudgetConfig:
    """The cost that all variants share with the baseline.

    Args:
        match: ``none``, ``active_parameters`` (per token) or ``flops`` (of training on the average token).
        width: configuration key of the MLP width that is changed until a variant costs what the baseline does.
        multiple: the width is a multiple of this.
        tolerance: share of the cost by which a variant may still differ.
    """

    match: str = "none"
    width: str = "model.moe.moe_ffn_hidden_size"
    multiple: int = 8
    tolerance: float = 0.02

    def __post_init__(self) -> None:
        require_one_of("budget.match", self.match, ("none", "active_parameters", "flops"))
        require_positive("budget", self, ("multiple", "tolerance"))


@dataclass
class EvaluationConfig:
    """One call of ``most evaluate`` for each finished run. Keys are its options; None is its default."""

    suite: str
    data: str
    limit: int | None = None
    vocabulary: list[str] = field(default_factory=list)
    normalizer: str | None = None

    def __post_init__(self) -> None:
        require_one_of("evaluation.suite", self.suite, ("asr", "tts"))
        if self.normalizer is not None:
            require_one_of("evaluation.normalizer", self.normalizer, NORMALIZERS)

    @property
    def name(self) -> str:
        """Name of its result: suite and set."""
        return f"{self.suite}_{Path(self.data).stem}"


@dataclass
class ResourcesConfig:
    """What one run takes.

    Args:
        ranks: per node.
        concurrent: number of runs at a time.
        minutes: time limit of a run.
        gpus_per_node, cpus_per_task, partition, account: SLURM's options.
    """

    nodes: int = 1
    ranks: int = 1
    concurrent: int = 1
    minutes: int = 60
    gpus_per_node: int = 0
    cpus_per_task: int = 1
    partition: str | None = None
    account: str | None = None

    def __post_init__(self) -> None:
        require_positive("resources", self, ("nodes", "ranks", "concurrent", "minutes", "cpus_per_task"))
        require_not_negative("resources", self, ("gpus_per_node",))


@dataclass
class SweepSpec:
    """The keys of a sweep file that have fixed types; :class:`Sweep` adds axes, baseline, skip and overrides.

    Paths are relative to the working directory.
    """

    name: str
    base: str
    output: str
    seeds: list[int]
    combine: str = "grid"
    metrics: list[str] = field(default_factory=list)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    evaluation: list[EvaluationConfig] = field(default_factory=list)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)

    def __post_init__(self) -> None:
        require_one_of("combine", self.combine, ("grid", "zip"))
        require(bool(self.seeds), "seeds", self.seeds, "needs at least one")
        require(len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "must not repeat a seed")
        names = [one.name for one in self.evaluation]
        require(
            len(set(names)) == len(names),
            "evaluation",
            names,
            "must not repeat a file name, which names the set",
        )


@dataclass(frozen=True)
class Variant:
    """One point of the axes.

    Args:
        choices: (axis, choice) for each axis.
        labels: of each choice: its name, or ``key=value`` if the axis is a key of the configuration.
        overrides: all overrides ``key=value`` of the base configuration.
    """

    choices: tuple[tuple[str, str], ...]
    labels: tuple[str, ...]
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return ", ".join(self.labels)

    @property
    def slug(self) -> str:
        """The name as part of a path."""
        return "".join(letter if letter.isalnum() or letter in "-_.=" else "-" for letter in "_".join(self.labels))


@dataclass(frozen=True)
class Sweep:
    """A sweep file, read and checked. ``baseline`` is one of ``variants``."""

    path: Path
    spec: SweepSpec
    variants: tuple[Variant, ...]
    baseline: Variant


def load_sweep(path: str | Path) -> Sweep:
    """Read a sweep file.

    Raises:
        ConfigError: the file cannot be read, or a key, type or rule is wrong. The configurations of the runs are
            checked later, by :func:`megatron_most.sweep.plan.plan_runs`.
    """
    path = Path(path)
    content = read_yaml(path)
    free = {key: content.pop(key, None) for key in ("axes", "baseline", "skip", "overrides")}
    check_shape(content, SweepSpec, "", str(path))
    missing = [key for key in ("name", "base", "output", "seeds") if key not in content]
    if missing or free["axes"] is None:
        raise ConfigError(f"{path}: {(missing or ['axes'])[0]}: a value is required")
    spec = cast(SweepSpec, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SweepSpec), content)))
    axes = {str(name): _choices(f"{path}: axes.{name}", name, choices) for name, choices in _axes(path, free["axes"])}
    skipped = free["skip"] or []
    if not isinstance(skipped, list):
        raise ConfigError(f"{path}: skip: must be a list of mappings from axes to choices")
    skip = [_point(f"{path}: skip[{index}]", axes, point) for index, point in enumerate(skipped)]
    common = _overrides(f"{path}: overrides", free["overrides"] or {})
    variants = tuple(
        variant
        for variant in _combined(path, axes, spec.combine, common)
        if not any(point.items() <= dict(variant.choices).items() for point in skip)
    )
    if not variants:
        raise ConfigError(f"{path}: skip: must leave a variant, excludes all")
    if free["baseline"] is None:
        return Sweep(path, spec, variants, variants[0])
    wanted = _point(f"{path}: baseline", axes, free["baseline"])
    matching = [variant for variant in variants if wanted.items() <= dict(variant.choices).items()]
    if len(matching) != 1:
        raise ConfigError(f"{path}: baseline={wanted}: must match one variant, matches {len(matching)}")
    return Sweep(path, spec, variants, matching[0])


def _axes(path: Path, axes: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(axes, Mapping) or not axes:
        raise ConfigError(f"{path}: axes: must map each axis to its choices, got {axes!r}")
    yield from axes.items()


def _choices(where: str, name: str, choices: Any) -> dict[str, tuple[str, ...]]:
    """Choice -> overrides. A list holds values of the key that names the axis; a mapping names its choices."""
    if isinstance(choices, list) and choices:
        values: dict[str, tuple[str, ...]] = {_text(value): (f"{name}={_text(value)}",) for value in choices}
        if len(values) < len(choices):
            raise ConfigError(f"{where}: must not repeat a value")
        return values
    if not isinstance(choices, Mapping) or not choices:
        raise ConfigError(f"{where}: must be a list of values, or map names to overrides")
    return {_text(choice): _overrides(f"{where}.{_text(choice)}", overrides) for choice, overrides in choices.items()}


def _overrides(where: str, overrides: Any) -> tuple[str, ...]:
    if not isinstance(overrides, Mapping) or not all(isinstance(key, str) for key in overrides):
        raise ConfigError(f"{where}: must map configuration keys to values ({{}} for none)")
    return tuple(f"{key}={_text(value)}" for key, value in overrides.items())


def _text(value: Any) -> str:
    """The value as YAML writes it. YAML reads ``on`` and ``off`` as booleans."""
    return yaml.safe_dump(value, default_flow_style=True, width=1 << 16).removesuffix("\n").removesuffix("\n...")


def _point(where: str, axes: Mapping[str, Mapping[str, Any]], point: Any) -> dict[str, str]:
    if not isinstance(point, Mapping) or not point:
        raise ConfigError(f"{where}: must map axes to choices")
    for axis, choice in point.items():
        if axis not in axes:
            raise ConfigError(f"{where}: {axis}: no such axis; axes are {', '.join(axes)}")
        if _text(choice) not in axes[axis]:
            raise ConfigError(f"{where}: {axis}: no choice {_text(choice)!r}; choices are {', '.join(axes[axis])}")
    return {axis: _text(choice) for axis, choice in point.items()}


def _combined(
    path: Path, axes: Mapping[str, Mapping[str, tuple[str, ...]]], combine: str, common: tuple[str, ...]
) -> Iterator[Variant]:
    lists = [[(axis, choice, overrides) for choice, overrides in choices.items()] for axis, choices in axes.items()]
    if combine == "zip" and len({len(choices) for choices in lists}) > 1:
        lengths = ", ".join(f"{axis} {len(choices)}" for axis, choices in axes.items())
        raise ConfigError(f"{path}: combine='zip': axes must have equal lengths: {lengths}")
    for point in zip(*lists, strict=True) if combine == "zip" else itertools.product(*lists):
        yield Variant(
            tuple((axis, choice) for axis, choice, _ in point),
            tuple(_label(axis, choice, overrides) for axis, choice, overrides in point),
            common + tuple(override for _, _, overrides in point for override in overrides),
        )


def _label(axis: str, choice: str, overrides: tuple[str, ...]) -> str:
    is_value = overrides == (f"{axis}={choice}",)
    return f"{axis.rpartition('.')[2]}={choice}" if is_value else choice
