"""Answers the visitors of the page, one step at a time. Nothing here knows how the page is made.

Shape letters: T samples.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_most.audio.io import stream_audio
from megatron_most.conversion.model_card import training_data
from megatron_most.data.building.special_tokens import special_tokens
from megatron_most.errors import ConfigError, DataError
from megatron_most.inference import Answer, Conversation, Decoding, LoadedModel, respond, transcribe
from megatron_most.inference.answers import Piece

TASKS = {
    "chat": "Chat: answer me",
    "asr": "Transcribe: write what I say",
    "tts": "Speak: read my text aloud",
    "continue": "Continue: go on where I stop",
}
"""Task, as ``most generate`` names it -> what the page calls it."""

TAUGHT_BY = {
    "asr": "asr",
    "tts": "tts",
    "chat": "chat",
    "text_lm": "continue",
    "speech_lm": "continue",
    "interleaved": "continue",
}
"""Task of a training dataset -> the task here that it teaches."""

_READABLE = "WAV, FLAC, Ogg, MP3 and AIFF files can be read"


@dataclass(frozen=True)
class Limits:
    """Of what a visitor may ask for.

    seconds, characters: of a recording and of a text.
    upload_mib: size of an uploaded file.
    waiting: requests that wait while one is answered.
    max_new, max_seconds: of an answer: ids of a text, seconds of speech.
    visitors: whose conversations are kept; beyond them the one that was silent longest is forgotten.
    """

    seconds: float = 30.0
    characters: int = 2000
    upload_mib: int = 20
    waiting: int = 8
    max_new: int = 256
    max_seconds: float = 20.0
    visitors: int = 64


@dataclass(frozen=True)
class Request:
    """What a visitor asks for.

    recording: an audio file.
    form: of the answer to ``chat`` and ``continue``.
    transcribes: write down what is said aloud, if the model can.
    """

    task: str
    text: str = ""
    recording: Path | None = None
    form: str = "written"
    system: str = ""
    transcribes: bool = False


@dataclass
class Exchange:
    """A request and what is known of its answer.

    said: the text that was written. recording: the file that was uploaded.
    heard, transcript: what the model, asked to transcribe, reads in the recording and in its own speech.
    parts: texts and waveforms ``[T]``, in order.
    new_sound: waveform ``[T]`` that was added last.
    notes: what a visitor should know.
    """

    said: str
    recording: Path | None
    sample_rate: int
    heard: str = ""
    transcript: str = ""
    parts: list[str | np.ndarray] = field(default_factory=list)
    new_sound: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)
    is_over: bool = False

    def add(self, piece: Piece) -> None:
        """Add to the last part, or begin another."""
        self.new_sound = None if isinstance(piece, str) else piece
        last = self.parts[-1] if self.parts else None
        if isinstance(last, str) and isinstance(piece, str):
            self.parts[-1] = last + piece
        elif isinstance(last, np.ndarray) and isinstance(piece, np.ndarray):
            self.parts[-1] = np.concatenate([last, piece])
        else:
            self.parts.append(piece)


def tasks_of(model: LoadedModel, has_codec: bool) -> tuple[str, ...]:
    """The tasks that the model was trained for; where that is not recorded, all that its vocabulary allows."""
    datasets = training_data(model.metadata) if model.metadata is not None else []
    taught = {TAUGHT_BY.get(one.task or "", "") for one in datasets}
    if not datasets or any(one.task is None for one in datasets):
        taught = set(TASKS)
    if not has_codec:
        taught -= {"asr", "tts"}
    try:
        special_tokens(model.config.vocab, model.tokenizer, roles=True)
    except ConfigError:  # the vocabulary has no room for the markers of turns
        taught -= {"chat"}
    return tuple(task for task in TASKS if task in taught)


class Host:
    """A model and its visitors. Requests may come from any thread; the model takes one step at a time.

    Args:
        tasks: those of :data:`TASKS` that are offered.
        has_codec: the model hears and speaks.
    """

    def __init__(self, model: LoadedModel, tasks: tuple[str, ...], limits: Limits, has_codec: bool = True) -> None:
        self.model, self.tasks, self.limits, self.has_codec = model, tasks, limits, has_codec
        self._step = threading.Lock()
        self._visits: OrderedDict[str, tuple[str, Conversation]] = OrderedDict()

    def forget(self, visitor: str) -> None:
        """Forget the conversation with a visitor, if there is one."""
        self._visits.pop(visitor, None)

    def answer(self, visitor: str, request: Request, decoding: Decoding) -> Iterator[Exchange]:
        """The exchange as it grows: once when the request is understood, then after every piece, and at the end.

        Raises:
            MostError: the request breaks a limit, cannot be read, or does not fit the model's context.
        """
        self._check(request, decoding)
        waveform = self._read(request.recording) if request.recording else None
        exchange = Exchange(request.text, request.recording, self.model.codec.sample_rate if self.has_codec else 0)
        conversation = self._conversation(visitor, request, exchange) if request.task == "chat" else None
        num_forgotten = conversation.num_forgotten if conversation else 0
        with self._step:
            pieces = self._begin(conversation, request, waveform, decoding)
        yield exchange
        answer = yield from self._told(exchange, pieces)
        if conversation and conversation.num_forgotten > num_forgotten:
            exchange.notes.append(
                f"The oldest turns no longer fit the model's context; forgotten so far: {conversation.num_forgotten}."
            )
        if answer.at_limit:
            exchange.notes.append("The answer reached its limit; its end may be missing.")
        if not exchange.parts:
            exchange.notes.append("The model answered nothing.")
        yield from self._transcribed(exchange, request, waveform, answer)
        exchange.is_over = True
        yield exchange

    def _begin(
        self, conversation: Conversation | None, request: Request, waveform: np.ndarray | None, decoding: Decoding
    ) -> Generator[Piece, None, Answer]:
        given: list[str | np.ndarray] = [request.text] if request.text.strip() else []
        given += [] if waveform is None else [waveform]
        if conversation is None:
            return respond(self.model, request.task, given, request.form, decoding)
        conversation.say(given[0])
        return conversation.answer(request.form, decoding)

    def _told(self, exchange: Exchange, pieces: Generator[Piece, None, Answer]) -> Generator[Exchange, None, Answer]:
        while True:
            try:
                with self._step:
                    piece = next(pieces)
            except StopIteration as stop:
                exchange.new_sound = None
                return stop.value
            exchange.add(piece)
            yield exchange

    def _transcribed(
        self, exchange: Exchange, request: Request, waveform: np.ndarray | None, answer: Answer
    ) -> Iterator[Exchange]:
        """What was said aloud and is not written anywhere yet."""
        if not request.transcribes or "asr" not in self.tasks or request.task == "asr":
            return
        if waveform is not None:
            with self._step:
                exchange.heard = self._text_of(self.model.codec.encode(waveform))
            yield exchange
        spoken = [segment for segment in answer.segments if not isinstance(segment, str)]
        if spoken:
            with self._step:
                exchange.transcript = " … ".join(self._text_of(codes) for codes in spoken)

    def _text_of(self, codes: np.ndarray) -> str:
        try:
            [text] = transcribe(self.model, [codes], self.limits.max_new)
        except ConfigError:  # longer than the model's context
            return ""
        return text

    def _check(self, request: Request, decoding: Decoding) -> None:
        limits, has_text, has_sound = self.limits, bool(request.text.strip()), request.recording is not None
        if request.task not in self.tasks:
            raise DataError(f"task {request.task}: this model offers {', '.join(self.tasks) or 'none'}")
        for name, text in (("the text", request.text), ("the system message", request.system)):
            if len(text) > limits.characters:
                raise DataError(f"{name}: has {len(text)} characters; at most {limits.characters} are read")
        if not self.has_codec and (has_sound or request.form != "written"):
            raise DataError("this model was loaded without a codec: it reads and writes, but neither hears nor speaks")
        if request.task == "asr" and not has_sound:
            raise DataError("record or upload something to transcribe")
        if request.task == "tts" and not has_text:
            raise DataError("write the text to speak")
        if not has_text and not has_sound:
            raise DataError("write something, or record or upload it")
        if request.task != "continue" and has_text and has_sound:
            raise DataError("write a text or give a recording, not both")
        for name, value, most in (
            ("max new tokens", decoding.max_new, limits.max_new),
            ("max seconds", decoding.max_seconds, limits.max_seconds),
        ):
            if value is None or not 0 < value <= most:
                raise DataError(f"{name}: is {value}; must be above 0 and at most {most:g}")

    def _read(self, path: Path) -> np.ndarray:
        """A recording as a waveform ``[T]`` at the codec's rate, never more of it than the limit."""
        codec, limits = self.model.codec, self.limits
        if path.stat().st_size > limits.upload_mib << 20:
            raise DataError(f"the recording: is larger than {limits.upload_mib} MiB")
        most = round(limits.seconds * codec.sample_rate)
        try:
            with path.open("rb") as file:  # not by its path, which is nobody's business
                pieces = stream_audio(file, codec.sample_rate, chunk=most + 1)
                waveform = next(pieces)
        except DataError as error:
            raise DataError(f"the recording: {str(error).removeprefix('audio: ')}; {_READABLE}") from None
        if len(waveform) > most:
            raise DataError(f"the recording: is longer than {limits.seconds:g} s, the most that is listened to")
        return waveform

    def _conversation(self, visitor: str, request: Request, exchange: Exchange) -> Conversation:
        system, conversation = self._visits.pop(visitor, (request.system, None))
        if conversation is None or system != request.system:
            if conversation is not None:
                exchange.notes.append("Another system message begins a new conversation.")
            conversation = Conversation(self.model, request.system.strip() or None)
        self._visits[visitor] = (request.system, conversation)
        while len(self._visits) > self.limits.visitors:
            self._visits.popitem(last=False)
        return conversation
