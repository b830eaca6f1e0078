"""Documents (ids, loss mask, codes) and their tasks.

Shape letters: n positions, m positions that hold side codes, C codebooks, F codec frames.

Codes are ``[F, C]`` everywhere in this project, on disk and in memory. NeMo's are ``[C, F]``; only
:mod:`megatron_most.audio.nemo_codec` transposes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_most.vocab import NO_CODE

TASKS = ("asr", "tts", "text_lm", "speech_lm", "interleaved", "chat")
"""A task's index here is its id in batches and metrics."""


@dataclass
class Document:
    """One training example, or several concatenated.

    ids: ``[n]`` int64.
    loss_mask: ``[n]`` bool, True where the id is a target.
    coded: ``[m]`` int64, the positions that hold side codes, ascending; None in the ``flat`` layouts.
    codes: ``[m, C]``, any integer type: their codes; None in the ``flat`` layouts.
    """

    ids: np.ndarray
    loss_mask: np.ndarray
    coded: np.ndarray | None = None
    codes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def side_codes(self) -> np.ndarray | None:
        """``[n, C]`` int64: the codes of each position, or ``NO_CODE``; None in the ``flat`` layouts."""
        if self.codes is None:
            return None
        side_codes = np.full((len(self.ids), self.codes.shape[1]), NO_CODE, dtype=np.int64)
        side_codes[self.coded] = self.codes
        return side_codes
