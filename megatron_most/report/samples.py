"""Speech samples as data URIs, so that the page carries its own sound."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from pathlib import Path

from megatron_most.errors import DataError, shown
from megatron_most.files import open_file
from megatron_most.report.run_files import RunFiles

MAX_SAMPLES = 12
MAX_BYTES = 3_200_000
"""Bounds of the page's size: utterances with sound, and bytes of WAV before base64."""

_LONGEST_NAME = 4096

KINDS = {"original_wav": "original", "roundtrip_wav": "codec round trip", "generated_wav": "generated"}


@dataclass
class Sample:
    """One utterance; ``sounds`` maps a key of :data:`KINDS` to a data URI."""

    set_name: str
    id: str
    reference: str
    heard: str = ""
    sounds: dict[str, str] = field(default_factory=dict)


def speech_samples(run: RunFiles) -> list[Sample]:
    """Utterances with sound, within the bounds, from all sets in turn. The run gets a note of what is left out."""
    paths: dict[tuple[str, str], dict[str, str]] = {}
    samples: dict[tuple[str, str], Sample] = {}
    for result in run.evaluation.values():
        for item in result.get("items", []):
            if not isinstance(item, dict):
                continue
            named = {kind: item[kind] for kind in KINDS if isinstance(item.get(kind), str)}
            if not named:
                continue
            key = (str(result.get("set", "")), str(item.get("id", "")))
            paths.setdefault(key, {}).update(named)
            sample = samples.setdefault(key, Sample(*key, str(item.get("reference", ""))))
            if "generated_wav" in named:
                sample.heard = str(item.get("hypothesis", ""))

    chosen: list[Sample] = []
    budget = MAX_BYTES
    problems: list[str] = []
    for key in _taking_turns(list(paths)):
        if len(chosen) == MAX_SAMPLES or budget <= 0:
            break
        sample = samples[key]
        for kind, name in paths[key].items():
            data = _wav(run.directory, name)
            if isinstance(data, bytes) and len(data) > budget:
                budget = 0
                break
            if isinstance(data, bytes):
                budget -= len(data)
                sample.sounds[kind] = "data:audio/wav;base64," + base64.b64encode(data).decode("ascii")
            else:
                problems.append(data)
        if sample.sounds:
            chosen.append(sample)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        run.notes.append(f"Sound left out: {problems[0]}{more}.")
    if len(chosen) < len(samples):
        run.notes.append(f"{len(chosen)} of {len(samples)} utterances with sound are on this page, to keep it small.")
    return sorted(chosen, key=lambda sample: run.sets.index(sample.set_name))


def _taking_turns(keys: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The keys ordered so that sets take turns, and a bound cuts all sets alike."""
    by_set: dict[str, list[tuple[str, str]]] = {}
    for key in keys:
        by_set.setdefault(key[0], []).append(key)
    longest = max((len(group) for group in by_set.values()), default=0)
    return [group[turn] for turn in range(longest) for group in by_set.values() if turn < len(group)]


def _wav(directory: Path, name: str) -> bytes | str:
    """The bytes of a WAV file inside the run directory, or why they cannot be used."""
    if "\0" in name or len(name) > _LONGEST_NAME:
        return f"{shown(name, 60)} is no name of a file"
    path = (directory / name).resolve()
    if not path.is_relative_to(directory.resolve()):
        return f"{name} is outside of the run directory"
    try:
        with open_file(path, DataError) as file:
            data = file.read(MAX_BYTES + 1)
    except DataError as error:
        return f"{name}: {str(error).removeprefix(f'{path}: ')}"
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return f"{name} is not a WAV file"
    return data
