"""The runs of a sweep. All configurations are checked before the first run starts."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_most.config import RunConfig, load_config, with_old_names
from megatron_most.errors import ConfigError
from megatron_most.evaluation.normalization import NORMALIZERS
from megatron_most.model import build, count_parameters
from megatron_most.planning import memory_per_rank, train_flops_per_token
from megatron_most.planning.overview import align
from megatron_most.sweep.budget import COSTS, matched_width
from megatron_most.sweep.spec import Sweep, Variant
from megatron_most.training.muon import check_muon

_NO_MATTER = ("run_dir", "logging")
"""Keys of a configuration that do not change what is trained."""


@dataclass(frozen=True)
class PlannedRun:
    """One run.

    Args:
        identity: hash of the resolved configuration, the provenance of its datasets, and its evaluations.
        missing: datasets and checkpoints that the configuration names and that do not exist.
        flops: of training on the average token.
        memory: estimated bytes of the rank that needs most.
    """

    variant: Variant
    seed: int
    config: RunConfig
    identity: str
    missing: tuple[str, ...]
    parameters: int
    active_parameters: int
    flops: float
    memory: float

    @property
    def directory(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def name(self) -> str:
        return f"{self.variant.name}, seed {self.seed}"


def plan_runs(sweep: Sweep) -> list[PlannedRun]:
    """Resolve and check the configuration of every run.

    Raises:
        ConfigError: a variant's configuration is wrong, does not fit the resources, cannot match the budget, or equals
            another's; the message names the variant.
    """
    spec = sweep.spec
    world_size = spec.resources.nodes * spec.resources.ranks

    def configure(variant: Variant, more: Sequence[str] = ()) -> RunConfig:
        try:
            config = load_config(spec.base, [*variant.overrides, *more])
            config.num_microbatches(config.parallel.data_parallel_size(world_size))
            build.check_libraries(config)
            check_muon(config)
        except ConfigError as error:
            raise ConfigError(f"{sweep.path}: variant {variant.name}: {error}") from None
        return config

    target = COSTS[spec.budget.match](configure(sweep.baseline)) if spec.budget.match != "none" else None
    runs = []
    for variant in sweep.variants:
        widths: list[str] = []
        if target is not None:
            widths = matched_width(spec.budget, target, functools.partial(configure, variant), variant.name)
        variant = replace(variant, overrides=(*variant.overrides, *widths))
        for seed in spec.seeds:
            runs.append(_planned(sweep, variant, seed, configure(variant, [f"seed={seed}"]), world_size))
    seen: dict[str, PlannedRun] = {}
    for run in runs:
        same = seen.setdefault(run.identity, run)
        if same is not run:
            raise ConfigError(f"{sweep.path}: the runs {same.name} and {run.name} are the same")
    return runs


def _planned(sweep: Sweep, variant: Variant, seed: int, config: RunConfig, world_size: int) -> PlannedRun:
    datasets = [f"{entry.path}.json" for entry in (*config.data.train, *config.data.validation)]
    files = [*datasets, *(file for file in (config.tokenizer, config.checkpoint.load) if file)]
    # Old names of keys, so that runs of earlier versions are found.
    content = {key: value for key, value in with_old_names(asdict(config)).items() if key not in _NO_MATTER}
    content["parallel"].pop("distributed_timeout_minutes")  # changes nothing that is trained
    content["provenance"] = {path: _digest(Path(path)) for path in datasets}
    # Earlier versions wrote whisper-english where no normalizer was named; their runs must be found.
    content["evaluation"] = [
        asdict(one) | {"normalizer": one.normalizer or NORMALIZERS[0]} for one in sweep.spec.evaluation
    ]
    identity = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    folder, end = Path(sweep.spec.output) / "runs", f"_seed-{seed}_{identity[:10]}"
    config.run_dir = str(next(folder.glob(f"*{end}"), folder / f"{variant.slug}{end}"))  # its label may have changed
    counts = count_parameters(config)
    return PlannedRun(
        variant,
        seed,
        config,
        identity,
        tuple(dict.fromkeys(file for file in files if not Path(file).exists())),
        counts["total"],
        counts["active"],
        train_flops_per_token(config),
        max(estimate.total for estimate in memory_per_rank(config, world_size).values()),
    )


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def describe_runs(sweep: Sweep, runs: list[PlannedRun]) -> str:
    """The text of ``--dry-run``: a line per variant, the overrides, and missing files."""
    spec = sweep.spec
    table = [("variant", "runs", "parameters", "active", "GFLOP per token", "GiB per rank", "max. positions")]
    for variant, mine in by_variant(runs):
        first = mine[0]
        training = first.config.training
        positions = training.train_iters * training.global_batch_size * first.config.data.seq_length
        name = f"{variant.name}{' (baseline)' if variant.choices == sweep.baseline.choices else ''}"
        table.append(
            (
                name,
                str(len(mine)),
                f"{first.parameters:,}",
                f"{first.active_parameters:,}",
                f"{first.flops / 1e9:.4g}",
                f"{first.memory / (1 << 30):.2f}",
                f"{positions:,}",
            )
        )
    width = max(len(row[0]) for row in table)
    resources = spec.resources
    lines = [
        f"{spec.name}: {len(runs)} runs, {resources.nodes} x {resources.ranks} ranks each, {resources.concurrent} at a"
        f" time, seeds {', '.join(map(str, spec.seeds))}, budget: {spec.budget.match}",
        *align([(row[0].ljust(width), *row[1:]) for row in table]),
    ]
    lines += [f"{variant.name}: {' '.join(variant.overrides)}" for variant, _ in by_variant(runs)]
    missing = sorted({file for run in runs for file in run.missing})
    if missing:
        lines.append(f"missing: {', '.join(missing)}")
    return "\n".join(lines)


def by_variant(runs: list[PlannedRun]) -> list[tuple[Variant, list[PlannedRun]]]:
    """Runs of each variant, in the order of the file."""
    groups: dict[Variant, list[PlannedRun]] = {}
    for run in runs:
        groups.setdefault(run.variant, []).append(run)
    return list(groups.items())
