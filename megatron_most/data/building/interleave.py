"""Consecutive utterances of one recording, alternating between text and audio.

Shape letters: C codebooks, F codec frames. Codes are ``[F, C]``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator

import numpy as np

from megatron_most.data.preparation.keyed_choice import choose
from megatron_most.data.storage.codes import Utterance

_LAST_NUMBER = re.compile(r"[^0-9A-Za-z]*\d+$")


def group_of(utterance_id: str) -> str:
    """The recording an utterance is from: its id without the last number (``84-121123-0007`` -> ``84-121123``)."""
    return _LAST_NUMBER.sub("", utterance_id)


def groups(utterances: Iterable[Utterance]) -> Iterator[tuple[str, list[Utterance]]]:
    """Each run of at least two consecutive utterances of one recording, with the recording's name."""
    for name, run in itertools.groupby(utterances, key=lambda utterance: group_of(utterance.id)):
        members = list(run)
        if len(members) > 1:
            yield name, members


def alternate(name: str, utterances: Iterable[Utterance]) -> list[str | np.ndarray]:
    """The utterances as text and codes ``[F, C]``, alternating; a hash of ``name`` determines which comes first."""
    first = choose((0, 1), "interleave", name)
    return [
        utterance.text if (place + first) % 2 == 0 else utterance.codes for place, utterance in enumerate(utterances)
    ]
