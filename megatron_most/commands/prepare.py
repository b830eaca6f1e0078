"""Prepare training data: read data sets, train a text tokenizer, encode audio, build and inspect datasets.

    most prepare tokenizer --manifest train.jsonl --vocab-size 512 --output tokenizer.model
    most prepare manifest --source librispeech --root LibriSpeech --output train.jsonl
    most prepare tokenize --manifest train.jsonl --codec codec.nemo --output codes/train
    most prepare build --task asr --codes codes/train --tokenizer tokenizer.model --output data/asr
    most prepare speechify --chat chat.jsonl --synthesizer "espeak-ng -w {output}" --output spoken
    most prepare inspect --dataset data/asr --tokenizer tokenizer.model --document 0

docs/data.md explains manifests, tasks and files.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_most import cli
from megatron_most.commands import prepare_sources
from megatron_most.data.building.chat_modes import MODES
from megatron_most.data.building.document_builder import LOSSES
from megatron_most.data.preparation.chat_files import MAX_FAILED
from megatron_most.data.storage.documents import TASKS
from megatron_most.errors import ConfigError
from megatron_most.extras import require
from megatron_most.files import require_writable
from megatron_most.vocab import CODEC_LAYOUTS, ModalityRange

if TYPE_CHECKING:
    from megatron_most.data.storage.token_dataset import TokenDataset
    from megatron_most.text import TextTokenizer


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("prepare", __doc__)
    commands_of = parser.add_subparsers(dest="command", required=True)
    _add_tokenizer(commands_of.add_parser("tokenizer", help="train a SentencePiece text tokenizer"))
    prepare_sources.add_parsers(commands_of)
    _add_build(commands_of.add_parser("build", help="codes or text -> a dataset of one task"))
    _add_inspect(commands_of.add_parser("inspect", help="show what a dataset holds"))
    _add_speechify(commands_of.add_parser("speechify", help="turns of a chat file -> speech"))
    return parser


def _add_tokenizer(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--manifest", nargs="+", required=True, help="JSON-lines manifests with the text to train on")
    sub.add_argument(
        "--vocab-size", type=int, required=True, help="maximum number of ids; 256 are bytes, 4 are special"
    )
    sub.add_argument("--output", required=True, help=".model file to write")


def _add_build(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--task", choices=TASKS, required=True, help="what the dataset teaches")
    sub.add_argument("--codes", nargs="+", default=[], help="path prefixes that most prepare tokenize wrote")
    sub.add_argument("--text", nargs="+", default=[], help="text_lm: manifests with text")
    sub.add_argument("--chat", nargs="+", default=[], help="chat: chat files; --codes holds their spoken turns")
    sub.add_argument(
        "--modes",
        nargs="+",
        choices=MODES,
        default=MODES,
        help="chat: user and assistant, each spoken (S) or written (T) (default: all)",
    )
    sub.add_argument(
        "--wordings", type=int, default=1, help="wordings of each instruction to draw from (default %(default)s)"
    )
    sub.add_argument("--loss", choices=LOSSES, default=LOSSES[0], help="positions with a loss (default %(default)s)")
    sub.add_argument(
        "--max-length", type=int, help="maximum positions of a document; set it to data.seq_length (default: no limit)"
    )
    sub.add_argument(
        "--over-length",
        choices=("reject", "chunk", "split"),
        default="reject",
        help="longer documents: leave out, cut anywhere, or split at sentences, turns or utterances"
        " (default %(default)s)",
    )
    sub.add_argument("--tokenizer", required=True, help="SentencePiece .model or Hugging Face tokenizer.json")
    sub.add_argument(
        "--layout", choices=CODEC_LAYOUTS, default="frame", help="the model's vocab.layout (default %(default)s)"
    )
    sub.add_argument("--text-vocab-size", type=int, help="the model's vocab.text_vocab_size (default: the tokenizer's)")
    sub.add_argument(
        "--num-codebooks", type=int, help="the model's vocab.num_codebooks: the codec's first (default: all of them)"
    )
    sub.add_argument("--codebook-size", type=int, help="the model's vocab.codebook_size, for datasets without codes")
    sub.add_argument(
        "--modality",
        action="append",
        default=[],
        metavar="NAME=START:STOP",
        help="make text ids START to STOP - 1 a modality of their own (vocab.further_modalities); may be repeated",
    )
    sub.add_argument("--output", required=True, help="path prefix of the dataset to write")
    sub.add_argument("--overwrite", action="store_true", help="replace an existing dataset")


def _add_inspect(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--dataset", nargs="+", required=True, help="path prefixes of datasets")
    sub.add_argument("--document", type=int, metavar="INDEX", help="show this document, counted from 0")
    sub.add_argument("--tokenizer", help="the datasets' tokenizer; another is refused. With --document, print its text")
    sub.add_argument("--codec", help="with --document: decode its codes with this codec")
    sub.add_argument("--wav", help="WAV file for the decoded codes")


def _add_speechify(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--chat", required=True, help="chat file (JSON lines)")
    sub.add_argument(
        "--synthesizer",
        required=True,
        help="command that reads text from standard input and writes the audio file {output};"
        " {role} and {voice} are replaced, too",
    )
    sub.add_argument(
        "--roles",
        nargs="+",
        choices=("user", "assistant"),
        default=["user", "assistant"],
        help="whose turns are spoken (default: both)",
    )
    sub.add_argument("--voices", nargs="+", default=[], help="values of {voice}; each role of a chat keeps one")
    sub.add_argument("--max-characters", type=int, default=600, help="longer turns stay written (default %(default)s)")
    sub.add_argument("--workers", type=int, help="number of processes (default: one per core)")
    sub.add_argument(
        "--max-failed",
        type=float,
        default=MAX_FAILED,
        help="share of turns that may fail before it is an error (default %(default)g)",
    )
    sub.add_argument("--output", required=True, help="folder to write: audio/, manifest.jsonl, chats.jsonl")


def train_tokenizer(arguments: argparse.Namespace) -> None:
    require_writable(arguments.output)
    from megatron_most.data.building.instructions import FIRST_INSTRUCTIONS
    from megatron_most.data.preparation.manifest import read_manifest
    from megatron_most.text import train_sentencepiece

    texts = [record.text for path in arguments.manifest for record in read_manifest(path, needs_audio=False)]
    tokenizer = train_sentencepiece(itertools.chain(texts, FIRST_INSTRUCTIONS), arguments.output, arguments.vocab_size)
    print(f"{arguments.output}: {tokenizer.vocab_size} ids from {len(texts)} texts")


def build(arguments: argparse.Namespace) -> None:
    cli.require_positive(arguments, "text_vocab_size", "num_codebooks", "codebook_size", "max_length")
    require_writable(f"{arguments.output}.json")
    if Path(f"{arguments.output}.json").exists() and not arguments.overwrite:
        raise ConfigError(f"{arguments.output}.json: exists already; name another --output, or add --overwrite")
    from megatron_most.data.building.build import Inputs, build_dataset
    from megatron_most.data.building.examples import TemplateOptions
    from megatron_most.data.building.length_limit import LengthLimit
    from megatron_most.data.building.vocab_options import VocabOptions
    from megatron_most.data.storage.inspection import summary

    dataset = build_dataset(
        arguments.output,
        arguments.task,
        arguments.tokenizer,
        Inputs(arguments.codes, arguments.text, arguments.chat),
        VocabOptions(
            layout=arguments.layout,
            text_vocab_size=arguments.text_vocab_size,
            num_codebooks=arguments.num_codebooks,
            codebook_size=arguments.codebook_size,
            further_modalities=[_modality_range(text) for text in arguments.modality],
        ),
        TemplateOptions(
            wordings=arguments.wordings,
            loss=arguments.loss,
            limit=LengthLimit(arguments.max_length, arguments.over_length),
            modes=arguments.modes,
        ),
        shlex.join(sys.argv),
    )
    counts = dataset.provenance["counts"]
    print(summary(dataset))
    print(
        f"  {counts['examples']} examples, {counts['cut']} of them cut; {counts['rejected']} examples or parts rejected"
        + (f"; {counts.get('unspoken', 0)} conversations without the recordings for any mode" if arguments.chat else "")
    )
    if arguments.chat:
        modes = ", ".join(f"{mode} {counts[mode]}" for mode in arguments.modes if mode in counts)
        print(f"  exchanges by mode: {modes}")
    if counts.get("textless"):
        print(f"  {counts['textless']} utterances have no text and are left out")
    if counts.get("unrecorded"):
        print(f"  {counts['unrecorded']} turns stay written: their recordings could not be tokenized")


def inspect(arguments: argparse.Namespace) -> None:
    from megatron_most.data.storage.inspection import statistics, summary, totals
    from megatron_most.data.storage.token_dataset import TokenDataset

    datasets = [TokenDataset(prefix) for prefix in arguments.dataset]
    if arguments.document is None and (arguments.codec or arguments.wav):
        raise ConfigError("--codec and --wav: need --document")
    if arguments.document is not None and len(datasets) > 1:
        raise ConfigError("--document: needs a single --dataset")
    tokenizer = _tokenizer_of(datasets, arguments.tokenizer) if arguments.tokenizer else None
    for dataset in datasets:
        print(summary(dataset))
        for key, value in dataset.provenance.items():
            print(f"  {key}: {value}")
        if arguments.document is None:
            print(*(f"  {line}" for line in statistics(dataset)), sep="\n")
    if arguments.document is not None:
        _show_document(arguments, datasets[0], tokenizer)
    elif len(datasets) > 1:
        print(*totals(datasets), sep="\n")


def _tokenizer_of(datasets: Sequence[TokenDataset], path: str) -> TextTokenizer:
    """Load a tokenizer; raises ConfigError if one of the datasets was built with another."""
    from megatron_most.text import load_tokenizer

    tokenizer = load_tokenizer(path)
    for dataset in datasets:
        built_with = dataset.provenance["tokenizer"]
        if built_with["fingerprint"] != tokenizer.fingerprint:
            raise ConfigError(f"--tokenizer={path}: {dataset.prefix} was built with another, {built_with['name']}")
    return tokenizer


def _show_document(arguments: argparse.Namespace, dataset: TokenDataset, tokenizer: TextTokenizer | None) -> None:
    if arguments.codec:
        require("nemo", "soundfile", "soxr")
    from megatron_most.audio import load_codec, write_wav
    from megatron_most.data.storage.inspection import audio_of, describe

    if not 0 <= arguments.document < len(dataset):
        raise ConfigError(f"--document={arguments.document}: must be in 0..{len(dataset) - 1}")
    document = dataset.document(arguments.document)
    if tokenizer is not None:
        shown = describe(document, dataset.vocab, tokenizer)
        print(f"document {arguments.document}: {shown}")
    if bool(arguments.codec) != bool(arguments.wav):
        raise ConfigError("--codec and --wav: each needs the other")
    if arguments.codec:
        require_writable(arguments.wav)
        segments = audio_of(document, dataset.vocab)
        codec = load_codec(arguments.codec)
        made_with = dataset.provenance["codec"] or {}
        if made_with.get("fingerprint") != codec.fingerprint:
            name = made_with.get("name")
            raise ConfigError(f"--codec={arguments.codec}: the dataset was made with another codec, {name}")
        wav = Path(arguments.wav)
        for number, codes in enumerate(segments, start=1):
            path = wav if len(segments) == 1 else wav.with_stem(f"{wav.stem}-{number}")
            write_wav(path, codec.decode(codes), codec.sample_rate)
            print(f"{path}: {len(codes) / codec.frame_rate:.2f} s")


def speechify(arguments: argparse.Namespace) -> None:
    cli.require_positive(arguments, "workers", "max_characters")
    if not 0 <= arguments.max_failed <= 1:
        raise ConfigError(f"--max-failed={arguments.max_failed}: must be in 0..1")
    require("soundfile", "soxr")
    from megatron_most.data.preparation.speechify import speak_chats

    counts = speak_chats(
        arguments.chat,
        arguments.output,
        arguments.synthesizer,
        roles=arguments.roles,
        voices=arguments.voices,
        max_characters=arguments.max_characters,
        workers=arguments.workers,
        max_failed=arguments.max_failed,
    )
    print(f"{arguments.output}: {', '.join(f'{count} {what}' for what, count in counts.items())}")


def _modality_range(text: str) -> ModalityRange:
    """``NAME=START:STOP`` -> the range; its rules are :class:`VocabLayout`'s."""
    name, _, numbers = text.partition("=")
    try:
        start, stop = map(int, numbers.split(":"))
    except ValueError:
        raise ConfigError(f"--modality={text}: must be NAME=START:STOP, ids START to STOP - 1") from None
    return ModalityRange(name, start, stop)


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "tokenizer": train_tokenizer,
    "manifest": prepare_sources.manifest,
    "tokenize": prepare_sources.tokenize,
    "build": build,
    "inspect": inspect,
    "speechify": speechify,
}


def prepare(arguments: argparse.Namespace) -> None:
    COMMANDS[arguments.command](arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    cli.run(make_parser(), prepare, arguments)


if __name__ == "__main__":
    main()
