"""Documents as ids, loss mask and codes, and the tasks they are of.

Shape letters: n positions, m positions that hold side codes, C codebooks, F codec frames.

Codes are ``[F, C]`` everywhere in this project, frame after frame, as they lie on disk and beside the ids. NeMo's are
``[C, F]``; :mod:`megatron_most.audio.nemo_codec` turns them around, and nothing else does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_most.vocab import NO_CODE

TASKS = ("asr", "tts", "text_lm", "speech_lm", "interleaved", "chat")
"""A task's index is its id in batches and metrics."""


@dataclass
class Document:
    """One training example, or several joined one after the other.

    ids: ``[n]`` int64.
    loss_mask: ``[n]`` bool, whether the id is something the model is to predict.
    coded: ``[m]`` int64, the positions that hold side codes, ascending; None in the ``flat`` layouts.
    codes: ``[m, C]`` of any integer type, their codes; None in the ``flat`` layouts.
    """

    ids: np.ndarray
    loss_mask: np.ndarray
    coded: np.ndarray | None = None
    codes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def side_codes(self) -> np.ndarray | None:
        """``[n, C]`` int64: the codes of every position, ``NO_CODE`` where it holds none; None where ``codes`` is."""
        if self.codes is None:
            return None
        side_codes = np.full((len(self.ids), self.codes.shape[1]), NO_CODE, dtype=np.int64)
        side_codes[self.coded] = self.codes
        return side_codes
