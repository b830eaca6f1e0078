"""Transcribe audio or speak text with a trained model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_most import cli
from megatron_most.errors import ConfigError, DataError
from megatron_most.extras import require
from megatron_most.files import require_writable, write_text


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("generate", __doc__)
    parser.add_argument(
        "--checkpoint", required=True, help="checkpoint directory, or run directory (its newest checkpoint)"
    )
    parser.add_argument("--task", required=True, choices=("asr", "tts"), help="transcribe audio or speak text")
    parser.add_argument(
        "--input", required=True, nargs="+", help="asr: audio files; tts: the text to speak, or a .txt file with it"
    )
    parser.add_argument("--output", help="asr: text file (default: print the text); tts: WAV file (required)")
    parser.add_argument("--tokenizer", help="text tokenizer, if it has moved since training")
    parser.add_argument("--codec", help="codec, if it has moved since training")
    parser.add_argument("--temperature", type=float, default=0.0, help="sampling temperature; 0 (default) is greedy")
    parser.add_argument(
        "--top-k", type=int, default=0, help="sample from the k most probable ids; 0 (default): from all"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the most probable ids that sum to p (default %(default)g)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling (default %(default)s)")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        help="asr: maximum length of a transcript in ids (default: what the model's context leaves)",
    )
    parser.add_argument(
        "--max-seconds",
        type=float,
        help="tts: maximum length of the speech (default: what the model's context leaves)",
    )
    return parser


def generate(arguments: argparse.Namespace) -> None:
    if arguments.task == "tts" and not arguments.output:
        raise ConfigError("--output: is required with --task tts: the WAV file to write")
    cli.require_positive(arguments, "max_new_tokens", "max_seconds")
    require("nemo", "soundfile", "soxr")
    from megatron_most.audio import read_audio, write_wav
    from megatron_most.inference import Sampling, load_for_generation, speak, transcribe

    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    text = _text(arguments.input) if arguments.task == "tts" else ""
    if arguments.output:
        require_writable(arguments.output)
    model = load_for_generation(arguments.checkpoint, arguments.tokenizer, arguments.codec)
    if arguments.task == "asr":
        codes = [model.codec.encode(read_audio(path, model.codec.sample_rate)) for path in arguments.input]
        at_limit: list[int] = []
        text = "\n".join(transcribe(model, codes, arguments.max_new_tokens, sampling, on_limit=at_limit.append))
        if arguments.output:
            write_text(arguments.output, text + "\n")
            print(f"{arguments.output}: {_count(len(arguments.input), 'transcript')}")
        else:
            print(text)
        for index in sorted(at_limit):
            _warn_of_limit(arguments.input[index], "--max-new-tokens", arguments.max_new_tokens)
    else:
        at_limit = []
        [spoken] = speak(model, [text], arguments.max_seconds, sampling, on_limit=at_limit.append)
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


def _text(words: list[str]) -> str:
    path = Path(words[0])
    if len(words) > 1 or path.suffix != ".txt":
        return " ".join(words)
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: must be UTF-8 text") from None


def main(arguments: Sequence[str] | None = None) -> None:
    cli.run(make_parser(), generate, arguments)


if __name__ == "__main__":
    main()
