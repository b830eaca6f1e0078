"""What suites share that ask spoken questions: one spoken turn of a chat, answered in writing or aloud."""

from __future__ import annotations

import io
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_most.audio import read_audio
from megatron_most.data.building.tasks import ChatTurn, make_chat
from megatron_most.data.storage.documents import Document
from megatron_most.errors import DataError
from megatron_most.evaluation.interface import Model, require_room
from megatron_most.evaluation.recognizers import Recognizer
from megatron_most.evaluation.suites.base import Outcome, Suite, attempt, merged
from megatron_most.inference import Decoding


class Asked(Protocol):
    """A spoken question: a file, or the bytes of one."""

    @property
    def id(self) -> str: ...

    @property
    def audio(self) -> Path | bytes: ...


class SpokenQuestionSuite[S: Asked](Suite[S]):
    """A chat with one spoken turn of the user's.

    Args:
        recognizer: reads spoken answers; None asks for written ones.
    """

    def __init__(self, decoding: Decoding | None, recognizer: Recognizer | None) -> None:
        self.decoding, self.recognizer = decoding or Decoding(), recognizer

    @property
    def settings(self) -> dict[str, Any]:
        judged_by = None if self.recognizer is None else self.recognizer.name
        return {"decoding": self.decoding.to_dict(), "recognizer": judged_by}

    @abstractmethod
    def judged(self, samples: Sequence[S], answers: Sequence[str]) -> list[Outcome]:
        """The outcomes of answers."""

    def failure(self, sample: S, reason: str) -> Outcome:
        return {**self.judged([sample], [""])[0], "failed": reason}

    def outcomes(self, model: Model, samples: Sequence[S]) -> list[Outcome]:
        prompts, failures = self.try_each(samples, lambda sample: self._prompt(model, sample))
        places = [place for place in range(len(samples)) if place not in failures]
        answers = model.generate(prompts, self.decoding, speech=self.recognizer is not None)
        heard: dict[int, str] = {}
        for place, answer in zip(places, answers, strict=True):
            text: Any = answer.text
            if self.recognizer is not None:
                waveform = attempt(model.codec.decode, answer.codes)
                text = attempt(self.recognizer.transcribe, waveform, model.codec.sample_rate)
            if isinstance(text, DataError):
                failures[place] = self.failure(samples[place], str(text))
            else:
                heard[place] = text
        judged = self.judged([samples[place] for place in heard], list(heard.values()))
        reached = {place for place, answer in zip(places, answers, strict=True) if answer.at_limit}
        for place, outcome in zip(heard, judged, strict=True):
            outcome |= {"at_limit": True} if place in reached else {}
        return merged(len(samples), failures, judged)

    def _prompt(self, model: Model, sample: S) -> Document:
        audio = io.BytesIO(sample.audio) if isinstance(sample.audio, bytes) else sample.audio
        codes = model.codec.encode(read_audio(audio, model.codec.sample_rate))[:, : model.vocab.num_codebooks]
        is_spoken = self.recognizer is not None
        turns, where = [ChatTurn("user", "", codes)], f"question {sample.id}"
        document = make_chat(
            model.vocab, model.tokenizer, turns, where=where, answer="spoken" if is_spoken else "written"
        )
        return require_room(model, document, model.vocab.codec_layout.num_positions(1) if is_spoken else 1)


def audio_of(file: Path, audio: Any) -> Path | bytes | None:
    """The audio in a cell of a table: its bytes, or a file beside the table; None if there is neither."""
    content = audio.get("bytes") if isinstance(audio, dict) else audio
    if isinstance(content, bytes):
        return content
    path = audio.get("path") if isinstance(audio, dict) else audio
    return file.parent / path if isinstance(path, str) and path else None
