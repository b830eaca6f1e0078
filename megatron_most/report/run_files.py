"""Reading a run directory: what is there, and a note for everything that is missing or cannot be read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_most.config import CONFIG, with_new_names
from megatron_most.data.storage.json_lines import read_lines
from megatron_most.errors import DataError
from megatron_most.files import parse_json, read_json, read_text
from megatron_most.yaml_text import MAX_BYTES, load_yaml

_LARGEST = 1e100
"""No quantity of a run is larger, and sums and quotients of smaller ones stay finite."""


@dataclass
class RunFiles:
    """The contents of a run directory. A missing file is an empty value and a note.

    Args:
        directory: the run directory.
        metrics: lines of ``metrics.jsonl``, training and validation, in the order of the file.
        routing: lines of ``routing.jsonl``.
        evaluation: contents of ``evaluation/*.json``, by file name.
        summary, environment, config: contents of ``summary.json``, ``environment.json`` and ``config.yaml``. Renamed
            configuration keys have their current names.
        config_text: ``config.yaml`` as it is written.
        notes: what is missing or broken, one sentence each.
    """

    directory: Path
    metrics: list[dict[str, Any]] = field(default_factory=list)
    routing: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, dict[str, Any]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def modalities(self) -> list[str]:
        """Names of the modalities in their order; text and audio if the configuration does not say."""
        try:
            return [str(group["modality"]) for group in self.config["model"]["moe"]["groups"]]
        except (KeyError, TypeError):
            return ["text", "audio"]

    def by_tokens(self) -> RunFiles | None:
        """The run with consumed tokens in place of steps, for charts by tokens; None if no tokens were logged."""
        logged = {line["step"]: count for line in self.metrics if (count := number(line.get("consumed_tokens")))}
        if not logged:
            return None
        steps = [0.0, *sorted(logged)]
        tokens = [0.0, *(logged[step] for step in steps[1:])]

        def replaced(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
            # Validation may log between two lines of training.
            return [line | {"step": float(np.interp(line["step"], steps, tokens))} for line in lines]

        return replace(self, metrics=replaced(self.metrics), routing=replaced(self.routing), notes=[])

    @property
    def sets(self) -> list[str]:
        """Names of the evaluated sets, ascending in their mean word error rate over all suites."""
        rates: dict[str, list[float]] = {}
        for result in self.evaluation.values():
            known = rates.setdefault(str(result.get("set", "")), [])
            if (rate := number(result.get("wer"))) is not None:
                known.append(rate)
        return sorted(rates, key=lambda name: (sum(rates[name]) / max(1, len(rates[name])), name))


def read_run(directory: str | Path) -> RunFiles:
    """Read what a run directory holds.

    Raises:
        DataError: no such directory, or it holds none of a run's files.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(f"{directory}: no such run directory")
    run = RunFiles(directory)
    run.metrics = _json_lines(run, "metrics.jsonl", "loss, learning rate and throughput over time")
    run.routing = _json_lines(run, "routing.jsonl", "which experts the tokens went to")
    run.summary = _json_object(run, "summary.json", "headline numbers beyond the metrics")
    run.environment = _json_object(run, "environment.json", "versions and the command")
    _read_config(run)
    _read_evaluation(run)
    if not (run.metrics or run.routing or run.summary or run.environment or run.config_text or run.evaluation):
        raise DataError(f"{directory}: holds no run (no metrics.jsonl, config.yaml or evaluation/*.json)")
    return run


def number(value: Any) -> float | None:
    """``value`` as a float; None for what is no quantity of a run: booleans, NaN, infinite and absurd numbers."""
    # The comparison fails for NaN, and takes integers of any size.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
        return None
    return float(value)


def _is_there(run: RunFiles, name: str, purpose: str) -> bool:
    if (run.directory / name).is_file():
        return True
    run.notes.append(f"{name} is missing: {purpose}.")
    return False


def _text(run: RunFiles, name: str, purpose: str) -> str:
    if not _is_there(run, name, purpose):
        return ""
    path = run.directory / name
    try:
        return read_text(path, DataError, limit=MAX_BYTES, errors="replace")
    except DataError as error:
        run.notes.append(f"{name} cannot be read: {str(error).removeprefix(f'{path}: ')}.")
        return ""


def _json_lines(run: RunFiles, name: str, purpose: str) -> list[dict[str, Any]]:
    if not _is_there(run, name, purpose):
        return []
    try:
        lines = [line for line in read_lines(run.directory / name) if line.problem or line.text.strip()]
    except DataError as error:
        run.notes.append(f"{name} cannot be read: {str(error).removeprefix(f'{run.directory / name}: ')}.")
        return []
    values, broken = [], []
    for index, line in enumerate(lines):
        try:
            value = parse_json(line.text)
        except ValueError:
            value = None
        if isinstance(value, dict) and number(value.get("step")) is not None:
            values.append(value)
        else:
            broken.append(index)
    if broken == [len(lines) - 1]:
        run.notes.append(f"The last line of {name} is incomplete and left out (the run was stopped while writing it).")
    elif broken:
        run.notes.append(f"{len(broken)} unreadable lines of {name} are left out, the first is line {broken[0] + 1}.")
    return values


def _json_object(run: RunFiles, name: str, purpose: str) -> dict[str, Any]:
    if not _is_there(run, name, purpose):
        return {}
    path = run.directory / name
    try:
        return read_json(path, DataError)
    except DataError as error:
        run.notes.append(f"{name} is left out: {str(error).removeprefix(f'{path}: ')}.")
        return {}


def _read_config(run: RunFiles) -> None:
    run.config_text = _text(run, CONFIG, "the configuration and the sizes of the expert groups")
    try:
        value = load_yaml(run.config_text) if run.config_text else {}
    except ValueError:
        value = None
    if isinstance(value, dict):
        run.config = with_new_names(value)
    else:
        run.notes.append("config.yaml is shown as it is, but it is not valid YAML.")


def _read_evaluation(run: RunFiles) -> None:
    paths = sorted((run.directory / "evaluation").glob("*.json"))
    if not paths:
        run.notes.append("evaluation/*.json is missing: word error rates, transcripts and speech samples.")
    for path in paths:
        name = f"evaluation/{path.name}"
        value = _json_object(run, name, "")
        if value and not isinstance(value.get("items", []), list):
            run.notes.append(f"{name} is left out: items must be a list.")
        elif value:
            run.evaluation[path.stem] = value
