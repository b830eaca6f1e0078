"""The instructions in the templates, each in several wordings; a document's id determines its wording."""

from __future__ import annotations

from megatron_most.data.preparation.keyed_choice import choose

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
"""Evaluation uses the first wording of each; so do datasets that do not ask for more."""

FIRST_INSTRUCTIONS = (INSTRUCTIONS["asr"][0], INSTRUCTIONS["tts"][0])
"""Added to the training text of small tokenizers."""


def choose_instruction(purpose: str, key: str, wordings: int) -> str:
    """One of the first ``wordings`` instructions for ``purpose`` (of all, if there are fewer), chosen by ``key``."""
    return choose(INSTRUCTIONS[purpose][:wordings], "instruction", purpose, key)
