"""What ``most generate`` prints and writes of a chat, or of what continues text and audio."""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_most.errors import DataError, MostError
from megatron_most.files import read_text

if TYPE_CHECKING:
    import numpy as np

    from megatron_most.inference import Answer, Decoding, LoadedModel
    from megatron_most.inference.answers import Piece

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff")
"""Names that end so are audio files; anything else is text."""

_HELP = "Write a turn, or the name of an audio file. /new starts over, /quit ends."


def is_audio_file(text: str) -> bool:
    return text.lower().endswith(AUDIO_SUFFIXES)


def piece_of(text: str) -> str | Path:
    """A text, the text of a ``.txt`` file, or the path of an audio file.

    Raises:
        DataError: a file does not exist or cannot be read.
    """
    if not is_audio_file(text):
        return text_of(text)
    if not Path(text).is_file():
        raise DataError(f"{text}: no such audio file")
    return Path(text)


def text_of(text: str) -> str:
    """The text itself, or that of a ``.txt`` file."""
    if not text.endswith(".txt"):
        return text
    try:
        return read_text(Path(text), DataError)
    except UnicodeDecodeError:
        raise DataError(f"{text}: must be UTF-8 text") from None


def chat(
    model: LoadedModel,
    system: str | None,
    turns: Sequence[str | Path],
    form: str,
    decoding: Decoding,
    output: str | None,
) -> None:
    """Answer the user's turns one after another."""
    from megatron_most.inference import Conversation

    conversation, printer = Conversation(model, system), _Printer(model, output, is_numbered=len(turns) > 1)
    for turn in turns:
        conversation.say(_heard(model, turn))
        printer.show(conversation.answer(form, decoding))


def converse(model: LoadedModel, system: str | None, form: str, decoding: Decoding, output: str | None) -> None:
    """Answer what is typed, until the end of the input. An error ends the turn, not the conversation."""
    from megatron_most.inference import Conversation

    conversation, printer = Conversation(model, system), _Printer(model, output, is_numbered=True)
    print(_HELP, file=sys.stderr)
    num_forgotten = 0
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line == "/new":
            conversation, num_forgotten = Conversation(model, system), 0
        elif line.startswith("/") and not is_audio_file(line):
            print(_HELP, file=sys.stderr)
        elif line:
            try:
                conversation.say(_heard(model, piece_of(line)))
                printer.show(conversation.answer(form, decoding))
            except MostError as error:
                print(f"error: {error}", file=sys.stderr)
            if conversation.num_forgotten > num_forgotten:
                num_forgotten = conversation.num_forgotten
                print(f"note: the oldest turns no longer fit; forgotten so far: {num_forgotten}", file=sys.stderr)


def go_on(model: LoadedModel, pieces: Sequence[str | Path], form: str, decoding: Decoding, output: str | None) -> None:
    """Continue texts and recordings."""
    from megatron_most.inference import respond

    heard = [_heard(model, piece) for piece in pieces]
    _Printer(model, output, is_numbered=False).show(respond(model, "continue", heard, form, decoding))


def _heard(model: LoadedModel, piece: str | Path) -> str | np.ndarray:
    """A text, or the waveform of an audio file."""
    from megatron_most.audio import read_audio

    return piece if isinstance(piece, str) else read_audio(piece, model.codec.sample_rate)


class _Printer:
    """Prints text as it comes and writes sound to files; only the first of several ranks does."""

    def __init__(self, model: LoadedModel, output: str | None, is_numbered: bool) -> None:
        self._model, self._output, self._is_numbered = model, output, is_numbered
        self._count = 0

    def show(self, pieces: Generator[Piece, None, Answer]) -> None:
        from megatron_most.parallel import is_rank_zero

        is_shown, sound = is_rank_zero(), []
        ends_line = True
        while True:
            try:
                piece = next(pieces)
            except StopIteration as stop:
                answer: Answer = stop.value
                break
            if not isinstance(piece, str):
                sound.append(piece)
            elif is_shown:
                print(piece, end="", flush=True)
                ends_line = piece.endswith("\n")
        if not is_shown:
            return
        if not ends_line:
            print()
        if sound:
            self._write(sound)
        if answer.at_limit:
            print("warning: the answer reached its limit; its end may be missing", file=sys.stderr)

    def _write(self, sound: Sequence[np.ndarray]) -> None:
        import numpy as np

        from megatron_most.audio import write_wav

        assert self._output is not None, "sound needs --output, which is checked before anything is loaded"
        self._count += 1
        path = Path(self._output)
        if self._is_numbered:
            path = path.with_name(f"{path.stem}_{self._count}{path.suffix}")
        waveform, rate = np.concatenate(sound), self._model.codec.sample_rate
        write_wav(path, waveform, rate)
        print(f"[{path}: {len(waveform) / rate:.2f} s of speech]")
