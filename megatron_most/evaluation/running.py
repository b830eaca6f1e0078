"""Runs a suite: over ranks, with its outcomes in a file as they come, so that a run that ended early goes on.

``<output>.results.jsonl`` (without the ``.json`` of ``<output>``) has one line that says what was asked and then one
line per sample. A later run of the same question takes the outcomes that it finds there. It tries again what failed,
and starts from nothing if the question is another.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_most import __version__, parallel
from megatron_most.errors import ConfigError, DataError, first_line
from megatron_most.evaluation.interface import Model
from megatron_most.evaluation.scores import CONFIDENCE, interval, score, units_of
from megatron_most.evaluation.suites.base import Outcome, Suite
from megatron_most.files import parse_json, replacing, write_json
from megatron_most.progress import Progress

CHUNK = 64
"""Samples that the ranks of a model judge before their outcomes are written."""
JUDGES = ("jiwer", "pocketsphinx", "whisper_normalizer")
"""Packages whose version may change a score."""


def run_suite(
    suite: Suite, model: Model | None, output: str | Path | None = None, *, fresh: bool = False
) -> dict[str, Any]:
    """Judge all samples; every rank returns the result, and rank 0 writes it. A collective call.

    Args:
        model: None for a suite that asks none.
        output: the JSON file of the result; None writes nothing.
        fresh: do not take outcomes from an earlier run.

    Raises:
        DataError: there are no samples, two have the same id, or none could be judged.
    """
    if model is not None:
        suite.bind(model)
    samples = suite.samples
    ids = [sample.id for sample in samples]
    if not ids:
        raise DataError(f"{suite.set_name}: no samples")
    if len(set(ids)) < len(ids):
        twice = next(identity for place, identity in enumerate(ids) if identity in ids[:place])
        raise DataError(f"{suite.set_name}: two samples have the id {twice!r}")
    asked = _question(suite, model, ids)
    journal = None if output is None else _Journal(results_path(output), asked)
    known = journal.start(fresh) if journal else {}
    pending = [sample for sample in samples if sample.id not in known]
    place, size = _share()
    what = f"{suite.name} {suite.set_name}"
    with Progress(what, len(ids), " samples", initial=len(known), enabled=_is_first() and bool(output)) as progress:
        for start in range(0, len(pending), CHUNK * size):
            found = suite.outcomes(model, pending[start : start + CHUNK * size][place::size])  # type: ignore[arg-type]
            gathered = _gather(found)
            known |= {outcome["id"]: outcome for outcome in gathered}
            if journal:
                journal.add(gathered)
            progress.add(len(gathered))
    outcomes = [known[identity] for identity in ids]
    result = _result(suite, asked, outcomes)
    if output is not None and _is_first():
        assert journal is not None
        journal.finish(outcomes)
        result["files"] = [journal.path.name, *(path.name for path in suite.write_files(outcomes, Path(output)))]
        write_json(output, result)
    return result


def _question(suite: Suite, model: Model | None, ids: Sequence[str]) -> dict[str, Any]:
    """All that decides about the outcomes."""
    return {
        "suite": suite.name,
        "set": suite.set_name,
        "settings": suite.settings,
        "model": None if model is None else model.description,
        "samples": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        "tool_version": __version__,
    }


def _result(suite: Suite, asked: dict[str, Any], outcomes: list[Outcome]) -> dict[str, Any]:
    failed = [{"id": outcome["id"], "failed": outcome["failed"]} for outcome in outcomes if "failed" in outcome]
    if len(failed) == len(outcomes):
        raise DataError(f"{suite.set_name}: no sample could be judged: {failed[0]['failed']}")
    units = units_of(outcomes)
    total, limits = score(units), interval(units)
    return {
        **{key: value for key, value in asked.items() if key != "samples"},
        "metric": suite.metric,
        "score": total,
        "interval": limits,
        "confidence": CONFIDENCE,
        "lower_is_better": suite.lower_is_better,
        "num_samples": len(outcomes),
        "num_units": len(units),
        "num_failed": len(failed),
        "failed": failed,
        "versions": _versions(),
        **suite.summary(outcomes, total, limits),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in JUDGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def results_path(output: str | Path) -> Path:
    """The file of outcomes beside a result.

    Raises:
        ConfigError: ``output`` is no ``.json`` file.
    """
    path = Path(output)
    if path.suffix != ".json":
        raise ConfigError(f"--output={output}: must be a .json file")
    return path.with_suffix(".results.jsonl")


def read_outcomes(result: str | Path) -> list[Outcome]:
    """The outcomes beside a result.

    Raises:
        DataError: they are missing or damaged.
    """
    path = results_path(result)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [parse_json(line) for line in lines[1:]]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as outcomes of samples: {first_line(error)}") from None


class _Journal:
    """The outcomes on disk, written by rank 0 alone."""

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        self.path, self.asked = path, json.loads(json.dumps(asked))

    def start(self, fresh: bool) -> dict[str, Outcome]:
        """What is known already, on every rank. Failures are not known: their file may have been mended."""
        if not dist.is_initialized():
            return self._start(fresh)
        return parallel.on_rank_zero(lambda: self._start(fresh))

    def _start(self, fresh: bool) -> dict[str, Outcome]:
        known = {} if fresh else self._read()
        with replacing(self.path) as temporary:
            temporary.write_text("".join(_line(entry) for entry in (self.asked, *known.values())), encoding="utf-8")
        return known

    def _read(self) -> dict[str, Outcome]:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        except (OSError, UnicodeDecodeError):
            return {}
        entries = []
        for line in lines:
            with suppress(ValueError):  # the last line of a run that was killed may be cut
                entries.append(parse_json(line))
        if not entries or entries[0] != self.asked:
            if entries:
                print(f"{self.path}: holds outcomes of another question; starting anew", file=sys.stderr, flush=True)
            return {}
        return {entry["id"]: entry for entry in entries[1:] if "failed" not in entry}

    def add(self, outcomes: Sequence[Outcome]) -> None:
        if not _is_first():
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(map(_line, outcomes)))
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written: {error.strerror or error}") from None

    def finish(self, outcomes: Sequence[Outcome]) -> None:
        """All outcomes, in the order of the samples."""
        with replacing(self.path, durable=True) as temporary:
            temporary.write_text("".join(_line(entry) for entry in (self.asked, *outcomes)), encoding="utf-8")


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _share() -> tuple[int, int]:
    """This rank's share of the samples: place and number of the groups of ranks that hold a model."""
    return parallel.whole_model_place() if dist.is_initialized() else (0, 1)


def _is_first() -> bool:
    return parallel.is_rank_zero()


def _gather(mine: list[Outcome]) -> list[Outcome]:
    """The outcomes of all ranks, once each."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mine
    everyone: list[list[Outcome]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine if parallel.speaks_for_model() else [])
    return [outcome for part in everyone for outcome in part]
