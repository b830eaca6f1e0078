"""What templates say to the model, in several wordings; which one depends on the document alone."""

from __future__ import annotations

import hashlib

INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "asr": (
        "Transcribe:",
        "Write down what is said:",
        "Turn this speech into text:",
        "Give the words of this recording:",
        "Please transcribe the audio:",
        "What is being said here?",
    ),
    "tts": (
        "Say:",
        "Read this aloud:",
        "Speak these words:",
        "Turn this text into speech:",
        "Please say the following:",
        "Give voice to this sentence:",
    ),
    "answer_spoken": (
        "Answer aloud.",
        "Please answer in speech.",
        "Reply with your voice.",
        "Say the answer.",
    ),
    "answer_written": (
        "Answer in writing.",
        "Please write your answer.",
        "Reply in text.",
        "Write the answer down.",
    ),
}
"""The first wording of each is the one that evaluation uses, and the only one unless a dataset asks for more."""

FIRST_INSTRUCTIONS = (INSTRUCTIONS["asr"][0], INSTRUCTIONS["tts"][0])
"""Text for small tokenizers to be trained on, beside the data's own."""


def fraction(*key: object) -> float:
    """A number in [0, 1) that depends on ``key`` alone: the same on every machine and in every run."""
    digest = hashlib.blake2b("\x00".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def choose_instruction(purpose: str, key: str, wordings: int) -> str:
    """One of the first ``wordings`` (or all, if there are fewer) instructions of ``purpose``, chosen by ``key``."""
    choices = INSTRUCTIONS[purpose][:wordings]
    return choices[int(fraction("instruction", purpose, key) * len(choices))]
