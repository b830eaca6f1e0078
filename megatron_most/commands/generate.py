"""Let a trained model transcribe, speak, chat, or continue text and audio."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_most import cli
from megatron_most.commands import talking
from megatron_most.commands.model_options import (
    AUDIO,
    SIZES,
    add_checkpoint,
    add_decoding,
    add_parts,
    add_sizes,
    decoding_of,
    layout_of,
)
from megatron_most.errors import ConfigError
from megatron_most.extras import require
from megatron_most.files import require_writable, write_text

if TYPE_CHECKING:
    from megatron_most.inference import Decoding, LoadedModel

TASKS = ("asr", "tts", "chat", "continue")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("generate", __doc__)
    add_checkpoint(parser)
    parser.add_argument(
        "--task",
        required=True,
        choices=TASKS,
        help="transcribe audio, speak text, answer the turns of a chat, or go on where the input ends",
    )
    parser.add_argument(
        "--input",
        nargs="+",
        help="asr: audio files; tts: the text to speak, or a .txt file with it; chat: the user's turns; continue: what"
        " to continue, piece by piece. A turn or piece is a text, a .txt file, or an audio file"
        f" ({', '.join(talking.AUDIO_SUFFIXES)})",
    )
    parser.add_argument("--interactive", action="store_true", help="chat: read the turns from the terminal")
    parser.add_argument(
        "--answer",
        choices=("written", "spoken", "either"),
        help="chat (default written), continue (default: as the last piece): in what form; either: the model chooses",
    )
    parser.add_argument("--system", help="chat: a message that stands before the first turn")
    parser.add_argument(
        "--output",
        help="asr: text file (default: print the text); else: WAV file for the speech. Several spoken answers are"
        " numbered: NAME_1.wav, NAME_2.wav, ...",
    )
    add_decoding(parser)
    add_parts(parser)
    add_sizes(parser)
    return parser


def generate(arguments: argparse.Namespace) -> None:
    cli.require_positive(arguments, "max_new_tokens", "max_seconds", *SIZES)
    form = _form(arguments)
    _check(arguments, form)
    # What cannot be read stops here, before a model is loaded.
    pieces = (
        [talking.piece_of(text) for text in arguments.input or []] if arguments.task in ("chat", "continue") else []
    )
    spoken = _text(arguments.input) if arguments.task == "tts" else ""
    needs_codec = arguments.interactive or form != "written" or any(not isinstance(piece, str) for piece in pieces)
    if needs_codec:
        require(*AUDIO)
    from megatron_most.inference import load_for_generation

    decoding = decoding_of(arguments)
    if arguments.output:
        require_writable(arguments.output)
    model = load_for_generation(
        arguments.checkpoint,
        arguments.tokenizer,
        arguments.codec,
        layout=layout_of(arguments),
        needs_codec=needs_codec,
    )
    if arguments.task == "asr":
        _transcribe(arguments, model, decoding)
    elif arguments.task == "tts":
        _speak(arguments, spoken, model, decoding)
    elif arguments.task == "continue":
        talking.go_on(model, pieces, form, decoding, arguments.output)
    elif arguments.interactive:
        talking.converse(model, arguments.system, form, decoding, arguments.output)
    else:
        talking.chat(model, arguments.system, pieces, form, decoding, arguments.output)


def _form(arguments: argparse.Namespace) -> str:
    """In what form the model answers."""
    if arguments.task in ("asr", "tts"):
        return "spoken"  # also the transcript needs the codec
    if arguments.answer is not None:
        return arguments.answer
    ends_in_audio = bool(arguments.input) and talking.is_audio_file(arguments.input[-1])
    return "spoken" if arguments.task == "continue" and ends_in_audio else "written"


def _check(arguments: argparse.Namespace, form: str) -> None:
    """Options that belong together."""
    task = arguments.task
    if arguments.interactive and task != "chat":
        raise ConfigError(f"--interactive: is for --task chat, not {task}")
    if arguments.interactive and arguments.input:
        raise ConfigError("--input: --interactive reads the turns from the terminal")
    if not arguments.interactive and not arguments.input:
        raise ConfigError(f"--input: is required with --task {task}")
    if arguments.answer is not None and task in ("asr", "tts"):
        raise ConfigError(f"--answer: is for --task chat and continue, not {task}")
    if arguments.system is not None and task != "chat":
        raise ConfigError(f"--system: is for --task chat, not {task}")
    if task != "asr" and form != "written" and not arguments.output:
        what = "--task tts" if task == "tts" else f"--answer {form}"
        raise ConfigError(f"--output: is required with {what}: the WAV file to write")
    if arguments.interactive and cli.launcher_integer("WORLD_SIZE", 1, least=1) > 1:
        raise ConfigError("--interactive: is for one process, not for torchrun")


def _transcribe(arguments: argparse.Namespace, model: LoadedModel, decoding: Decoding) -> None:
    from megatron_most.audio import read_audio
    from megatron_most.inference import transcribe
    from megatron_most.parallel import is_rank_zero

    codes = [model.codec.encode(read_audio(path, model.codec.sample_rate)) for path in arguments.input]
    at_limit: list[int] = []
    texts = transcribe(model, codes, decoding.max_new, decoding.sampling, on_limit=at_limit.append)
    if not is_rank_zero():
        return
    if arguments.output:
        write_text(arguments.output, "\n".join(texts) + "\n")
        print(f"{arguments.output}: {_count(len(texts), 'transcript')}")
    else:
        print("\n".join(texts))
    for index in sorted(at_limit):
        _warn_of_limit(arguments.input[index], "--max-new-tokens", arguments.max_new_tokens)


def _text(inputs: Sequence[str]) -> str:
    return talking.text_of(inputs[0]) if len(inputs) == 1 else " ".join(inputs)


def _speak(arguments: argparse.Namespace, text: str, model: LoadedModel, decoding: Decoding) -> None:
    from megatron_most.audio import write_wav
    from megatron_most.inference import speak
    from megatron_most.parallel import is_rank_zero

    at_limit: list[int] = []
    [spoken] = speak(model, [text], decoding.max_seconds, decoding.sampling, on_limit=at_limit.append)
    if not is_rank_zero():
        return
    waveform = model.codec.decode(spoken)
    write_wav(arguments.output, waveform, model.codec.sample_rate)
    seconds = len(waveform) / model.codec.sample_rate
    print(f"{arguments.output}: {seconds:.2f} s of speech at {model.codec.sample_rate} Hz")
    if at_limit:
        _warn_of_limit(arguments.output, "--max-seconds", arguments.max_seconds)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _warn_of_limit(name: str, option: str, value: float | None) -> None:
    limit = "the model's context" if value is None else f"{option}={value:g}"
    print(f"warning: {name}: the answer reached its limit ({limit}); its end may be missing", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    cli.run(make_parser(), generate, arguments)


if __name__ == "__main__":
    main()
