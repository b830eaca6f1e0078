"""Training examples as ids, loss mask and codes, and the tasks they are of.

Shape letters: n positions of a document, C codebooks, F codec frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TASKS = ("asr", "tts", "text_lm", "speech_lm", "interleaved", "chat")
"""A task's index is its id in batches and metrics."""


@dataclass
class Document:
    """One training example.

    ids: ``[n]`` int64.
    loss_mask: ``[n]`` bool, whether the id is something the model is to predict.
    codes: ``[n, C]`` int64, ``NO_CODE`` where the position holds none; None in the ``flat`` layouts.
    """

    ids: np.ndarray
    loss_mask: np.ndarray
    codes: np.ndarray | None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Documents:
    """Several documents, one after the other.

    ids, loss_mask: ``[n]``, as in :class:`Document`.
    codes: ``[m, C]`` of any integer type, for the m positions that hold side codes; None in the ``flat`` layouts.
    coded: ``[m]`` int64, these positions, ascending; None in the ``flat`` layouts.
    lengths: int64, positions of each document.
    """

    ids: np.ndarray
    loss_mask: np.ndarray
    codes: np.ndarray | None
    coded: np.ndarray | None
    lengths: np.ndarray
