"""Answers of text and audio to prompts: whole, or piece by piece while they are generated.

Shape letters: n positions, C codebooks, F codec frames, T samples.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_most.audio.sound_stream import SoundStream
from megatron_most.data.storage.documents import Document
from megatron_most.errors import ConfigError
from megatron_most.inference.generator import Row
from megatron_most.inference.grammar import Grammar, mixed_grammar, speech_grammar, text_grammar
from megatron_most.inference.loading import LoadedModel
from megatron_most.inference.sampling import Decoding
from megatron_most.vocab import VocabLayout

FORMS = ("written", "spoken", "either")
"""Of an answer. The prompt of a spoken one ends inside audio; ``either`` lets the model choose."""

Piece = str | np.ndarray
"""Of an answer that is generated: text, or a waveform ``[T]`` at the codec's sample rate."""

_CHUNK_SECONDS = 0.25
"""Sound of a piece, at least."""

_PIECE_POSITIONS = 4
"""New positions after which pieces are looked for. The host waits for the device each time."""


@dataclass(frozen=True)
class Answer:
    """segments: texts, and codes ``[F, C]``. at_limit: its end may be missing."""

    segments: tuple[str | np.ndarray, ...]
    at_limit: bool = False

    @property
    def text(self) -> str:
        return "".join(segment for segment in self.segments if isinstance(segment, str))

    @property
    def codes(self) -> np.ndarray | None:
        """Of the first segment of audio, if there is one."""
        return next((segment for segment in self.segments if not isinstance(segment, str)), None)


def answer(
    model: LoadedModel,
    prompts: Sequence[Document],
    form: str = "written",
    decoding: Decoding | None = None,
    *,
    alternates: bool = False,
    batch_size: int = 32,
) -> list[Answer]:
    """The answer to each prompt. No prompt changes the answer to another, except by rounding.

    Args:
        form: one of :data:`FORMS`.
        decoding: its limits hold for each text and each segment of audio. The model's context always bounds an answer.
        alternates: with ``either``, text and audio may follow each other; else an answer is one of them.

    Raises:
        ConfigError: a prompt leaves no room for an answer in the model's context.
    """
    decoding = decoding or Decoding()
    plans = [_Plan(model, prompt, form, decoding, alternates) for prompt in prompts]
    answers: list[Answer | None] = [None] * len(prompts)
    # A limit of frames is part of the grammar of a batch, which ends the last codebook of a delay pattern after it.
    for grammar in dict.fromkeys(plan.grammar_key for plan in plans):
        alike = [index for index, plan in enumerate(plans) if plan.grammar_key == grammar]
        for batch in batches_of_similar_length([len(prompts[index].ids) for index in alike], batch_size):
            indices = [alike[place] for place in batch]
            rows = model.generator.rows(
                [prompts[index] for index in indices],
                plans[indices[0]].grammar,
                [plans[index].limit for index in indices],
                decoding.sampling,
            )
            for index, row in zip(indices, rows, strict=True):
                answers[index] = plans[index].answer(row)
    return [one for one in answers if one is not None]


def stream(
    model: LoadedModel,
    prompt: Document,
    form: str = "written",
    decoding: Decoding | None = None,
    *,
    alternates: bool = False,
) -> Generator[Piece, None, Answer]:
    """The pieces of the answer to a prompt as they come; returns what :func:`answer` does, with the same arguments.

    Texts joined are the answer's text. Sound joined is the sound of its codes: exactly where a frame's sound depends on
    few frames around it, as in a causal codec; else close to it, without jumps.
    """
    decoding = decoding or Decoding()
    plan = _Plan(model, prompt, form, decoding, alternates)
    model.generator.require_room([prompt], [plan.limit])
    pieces = _Pieces(plan)
    row = Row.nothing(model.config.vocab.num_codebooks)
    for ids, codes in model.generator.positions(
        [prompt], plan.grammar, plan.limit, decoding.sampling, every=_PIECE_POSITIONS
    ):
        # What comes after the end is read and thrown away: ranks that hold the model together stop together.
        if not row.is_ended:
            row = Row.until(plan.grammar.ends, np.append(row.ids, ids[0]), np.concatenate([row.codes, codes[0]]))
            yield from pieces.read(row, is_over=row.is_ended)
    if not row.is_ended:
        yield from pieces.read(row, is_over=True)
    return plan.answer(row)


class _Plan:
    """Under which grammar and limit a prompt is continued, and how to read what comes of it."""

    def __init__(self, model: LoadedModel, prompt: Document, form: str, decoding: Decoding, alternates: bool) -> None:
        if form not in FORMS:
            raise ConfigError(f"answer={form!r}: must be one of {', '.join(FORMS)}")
        vocab, tokenizer = model.config.vocab, model.tokenizer
        self.model, self.vocab, self.layout = model, vocab, vocab.codec_layout
        self.starts_in_audio = form == "spoken"
        room = max(1, model.config.data.seq_length - len(prompt.ids))
        self.max_new = decoding.max_new
        start = 1 + int(np.flatnonzero(prompt.ids == vocab.begin_of_audio)[-1]) if self.starts_in_audio else len(prompt)
        side_codes = prompt.side_codes
        self._open_ids = prompt.ids[start:]
        self._open_codes = np.full((len(self._open_ids), vocab.num_codebooks), -1)
        if side_codes is not None:
            self._open_codes = side_codes[start:]
        self.num_before = int(self.layout.is_leading(self._open_ids).sum())
        # A model that was loaded for text alone has no codec, which knows how long a frame is.
        self.max_frames = 0 if form == "written" else self._most_frames(room, decoding.max_seconds)
        text = (tokenizer.vocab_size, (tokenizer.eos_id, *model.stop_ids), (tokenizer.bos_id, tokenizer.pad_id))
        self.grammar_key: tuple = (text_grammar, *text)
        self.limit = room if self.max_new is None else min(self.max_new, room)
        if form == "spoken":
            # Beyond the delay of the last codebook it does not matter how many frames there were.
            self.grammar_key = (speech_grammar, self.max_frames, min(self.num_before, vocab.num_codebooks))
            self.limit = self._positions_of(self.max_frames)
        elif form == "either":
            self.grammar_key = (mixed_grammar, *text, self.max_new, self.max_frames, alternates)
            self.limit = room

    @property
    def grammar(self) -> Grammar:
        return self.model.generator.grammar(*self.grammar_key)

    def answer(self, row: Row) -> Answer:
        segments: list[str | np.ndarray] = []
        at_limit = not row.is_ended
        for where, is_audio in segments_of(self.vocab, row.ids, self.starts_in_audio):
            if is_audio:
                _, frames = self.frames(row, where)
                segments += [frames] if len(frames) else []
                at_limit |= len(frames) == self.max_frames
            else:
                segments.append(self.model.tokenizer.decode(row.ids[where].tolist()))
                at_limit |= where.stop - where.start == self.max_new
        return Answer(tuple(segments), at_limit)

    def frames(self, row: Row, where: slice) -> tuple[np.ndarray, np.ndarray]:
        """Codes ``[F, C]`` of the whole frames in a segment: those that the prompt began, and those after them."""
        ids, codes, num_before = row.ids[where], row.codes[where], 0
        if self.starts_in_audio and where.start == 0:
            ids, codes = np.append(self._open_ids, ids), np.concatenate([self._open_codes, codes])
            num_before = self.num_before
        frames = self.layout.whole_frames(ids, codes)
        return frames[:num_before], frames[num_before:]

    def _positions_of(self, num_frames: int) -> int:
        """Positions of so many frames after those of the prompt."""
        return self.layout.num_positions(self.num_before + num_frames) - len(self._open_ids)

    def _most_frames(self, room: int, max_seconds: float | None) -> int:
        """Frames that fit into ``room`` positions, at most those of ``max_seconds``, and at least one."""
        # Positions of a layout are linear in the frames.
        first = self._positions_of(1)
        fitting = max(1, 1 + (room - first) // (self._positions_of(2) - first))
        if max_seconds is None:
            return fitting
        return min(max(1, int(max_seconds * self.model.codec.frame_rate)), fitting)


class _Pieces:
    """What can be given of an answer that grows."""

    def __init__(self, plan: _Plan) -> None:
        self._plan, self._model = plan, plan.model
        self._num_closed = 0
        self._begin()

    def _begin(self) -> None:
        self._text, self._num_frames = "", 0
        self._sound: SoundStream | None = None

    def read(self, row: Row, is_over: bool) -> Iterator[Piece]:
        """The new pieces of a row that has grown; all that is left if it ``is_over``."""
        found = segments_of(self._plan.vocab, row.ids, self._plan.starts_in_audio)
        for place in range(self._num_closed, len(found)):
            where, is_audio = found[place]
            is_closed = is_over or where.stop < len(row.ids)
            if is_audio:
                yield from self._audio(*self._plan.frames(row, where), is_closed)
            else:
                yield from self._words(row.ids[where].tolist(), is_closed)
            if is_closed:
                if self._sound is not None and len(rest := self._sound.finish()):
                    yield rest
                self._num_closed += 1
                self._begin()

    def _words(self, ids: list[int], is_closed: bool) -> Iterator[str]:
        text = self._model.tokenizer.decode(ids)
        if not is_closed:
            # The bytes of a character may be several ids.
            text = text.rstrip("\ufffd")
        if len(text) > len(self._text) and (is_closed or text.startswith(self._text)):
            yield text[len(self._text) :]
            self._text = text

    def _audio(self, before: np.ndarray, frames: np.ndarray, is_closed: bool) -> Iterator[np.ndarray]:
        codec, num_new = self._model.codec, len(frames) - self._num_frames
        if not num_new or not (is_closed or num_new >= max(1, round(_CHUNK_SECONDS * codec.frame_rate))):
            return
        if self._sound is None:
            self._sound = SoundStream(codec, self._plan.vocab.num_codebooks, before)
        sound = self._sound.add(frames[self._num_frames :])
        self._num_frames = len(frames)
        if len(sound):
            yield sound


def segments_of(vocab: VocabLayout, ids: np.ndarray, starts_in_audio: bool = False) -> list[tuple[slice, bool]]:
    """Where the segments of ``ids [n]`` are, without the ids between text and audio, and which of them are audio."""
    marks = np.flatnonzero((ids == vocab.begin_of_audio) | (ids == vocab.end_of_audio))
    found: list[tuple[slice, bool]] = []
    start, is_audio = 0, starts_in_audio
    for mark in [*marks.tolist(), len(ids)]:
        if mark > start:
            found.append((slice(start, mark), is_audio))
        start, is_audio = mark + 1, mark < len(ids) and ids[mark] == vocab.begin_of_audio
    return found


def batches_of_similar_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of indices, longest first: little padding, and if memory does not suffice, the first batch fails."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
