"""Scorers of generated speech: what its words do not tell, such as the voice, the quality and the pace.

Each is loaded when it is asked for, because each needs packages of its own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from megatron_most.errors import ConfigError

Reference = Literal["recording", "voice"]
"""What speech is compared with: a recording of the same text, or of the voice to speak with."""


class Sound(NamedTuple):
    """``audio`` is float ``[num_samples]`` in -1..1."""

    audio: np.ndarray
    sample_rate: int


class Scorer(Protocol):
    """What an evaluation asks of a scorer.

    name: what results call it: all that decides about its values, with the version of its package.
    compared_with: what it needs beside the speech; None if nothing.
    values: name of each value that it gives -> what speech counts as that is missing or cannot be scored.
    """

    @property
    def name(self) -> str: ...

    @property
    def compared_with(self) -> Reference | None: ...

    @property
    def values(self) -> Mapping[str, float]: ...

    def score(self, spoken: Sound, reference: Sound | None) -> dict[str, float]:
        """One number for each of :attr:`values`.

        Raises:
            DataError: the sound cannot be scored.
        """
        ...


SCORERS = {
    "duration": "seconds of the speech, as a share of those of a recording of the same text",
    "resemblyzer": "similarity of the voices, by resemblyzer's speaker encoder",
    "xvector=FOLDER": "similarity of the voices, by an x-vector model of transformers such as WavLM's",
    "dnsmos": "mean opinion scores that DNSMOS predicts (package speechmos)",
}
"""How a scorer is named -> what it measures."""


def load_scorer(named: str) -> Scorer:
    """The scorer of ``NAME`` or ``NAME=PATH``. Nothing is downloaded.

    Raises:
        ConfigError: there is no such scorer, its package is not installed, or its files cannot be read.
    """
    name, given, path = named.partition("=")
    loaders: dict[str, Callable[[], Scorer]] = {"duration": _duration, "resemblyzer": _resemblyzer, "dnsmos": _dnsmos}
    if name == "xvector" and path:
        return _xvector(Path(path))
    if name not in loaders or given:
        raise ConfigError(f"--scorer {named}: must be one of {', '.join(SCORERS)}")
    return loaders[name]()


def _duration() -> Scorer:
    from megatron_most.evaluation.scorers.duration import DurationRatio

    return DurationRatio()


def _resemblyzer() -> Scorer:
    from megatron_most.evaluation.scorers.speaker import ResemblyzerSimilarity

    return ResemblyzerSimilarity()


def _xvector(folder: Path) -> Scorer:
    from megatron_most.evaluation.scorers.speaker import XVectorSimilarity

    return XVectorSimilarity(folder)


def _dnsmos() -> Scorer:
    from megatron_most.evaluation.scorers.dnsmos import Dnsmos

    return Dnsmos()


def require_installed(scorer: str, command: str, *modules: str) -> None:
    """Raise :class:`ConfigError` with the ``command`` that installs it unless these modules are there."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"--scorer {scorer}: needs {module}, which is not installed: {command}")
