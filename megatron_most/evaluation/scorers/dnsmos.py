"""Mean opinion scores that DNSMOS predicts, from 1 to 5, without a recording to compare with.

It was trained on noisy calls (Reddy et al. 2022, arXiv 2110.01763): it hears noise and damaged speech, and little of
what makes clean synthetic speech sound natural.
"""

from __future__ import annotations

from importlib.metadata import version

import numpy as np

from megatron_most.errors import DataError
from megatron_most.evaluation.recognizers import heard
from megatron_most.evaluation.scorers import Reference, Sound, require_installed

SAMPLE_RATE = 16000
_VALUES = {
    "dnsmos_overall": "ovrl_mos",
    "dnsmos_signal": "sig_mos",
    "dnsmos_background": "bak_mos",
    "dnsmos_p808": "p808_mos",
}


class Dnsmos:
    """By the package ``speechmos``, which holds the models.

    Raises:
        ConfigError: a package is not installed.
    """

    compared_with: Reference | None = None
    values = dict.fromkeys(_VALUES, 1.0)

    def __init__(self) -> None:
        require_installed("dnsmos", "pip install speechmos", "speechmos", "librosa", "onnxruntime", "requests")
        from speechmos import dnsmos

        self._run = dnsmos.run
        self.name = f"dnsmos of speechmos {version('speechmos')}"

    def score(self, spoken: Sound, reference: Sound | None) -> dict[str, float]:
        audio = heard(spoken.audio, spoken.sample_rate, SAMPLE_RATE)
        if not len(audio):
            raise DataError("no sound to score")  # speechmos would repeat it forever
        found = self._run(np.clip(audio, -1, 1), sr=SAMPLE_RATE)
        return {name: float(found[theirs]) for name, theirs in _VALUES.items()}
