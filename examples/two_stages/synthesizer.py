"""A synthesizer for ``most prepare speechify``: the quickstart's voice, one process for many turns.

It reads lines of JSON ``{"text", "output", "voice", "role"}`` from standard input, speaks each into a WAV file, and
answers with a line ``{}``. Speed, pitch and offset are those of the quickstart's corpus, drawn by the text.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.quickstart.espeak import Espeak  # noqa: E402
from examples.quickstart.make_corpus import SAMPLE_RATE, render  # noqa: E402
from examples.quickstart.sentences import MAX_OFFSET, PITCHES, SPEEDS  # noqa: E402


def manner(key: str, **fixed: Any) -> dict[str, Any]:
    """How something is said, drawn by ``key`` as in the corpus, except for what is ``fixed``."""
    rng = random.Random(key)
    drawn = {"speed": rng.choice(SPEEDS), "pitch": rng.choice(PITCHES), "offset": rng.randrange(MAX_OFFSET)}
    return drawn | fixed


def write_wav(path: Path, waveform: np.ndarray) -> None:
    """16 bit, at :data:`SAMPLE_RATE`."""
    soundfile.write(path, waveform, SAMPLE_RATE, subtype="PCM_16")


def main() -> None:
    engine = Espeak()
    for line in sys.stdin:
        turn = json.loads(line)
        voice = {"voice": turn["voice"]} if turn["voice"] else {}
        write_wav(Path(turn["output"]), render(engine, {"text": turn["text"], **manner(turn["text"], **voice)}))
        print("{}", flush=True)


if __name__ == "__main__":
    main()
