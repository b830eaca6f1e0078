"""What templates say to the model, in several wordings; which one depends on the document alone."""

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
"""The first wording of each is the one that evaluation uses, and the only one unless a dataset asks for more."""

FIRST_INSTRUCTIONS = (INSTRUCTIONS["asr"][0], INSTRUCTIONS["tts"][0])
"""Text for small tokenizers to be trained on, beside the data's own."""


def choose_instruction(purpose: str, key: str, wordings: int) -> str:
    """One of the first ``wordings`` (or all, if there are fewer) instructions of ``purpose``, chosen by ``key``."""
    return choose(INSTRUCTIONS[purpose][:wordings], "instruction", purpose, key)
