"""Prepare training data: read data sets, train a text tokenizer, turn audio into codes, build datasets, inspect them.

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


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("prepare", __doc__)
    commands_of = parser.add_subparsers(dest="command", required=True)

    sub = commands_of.add_parser("tokenizer", help="train a SentencePiece text tokenizer")
    sub.add_argument("--manifest", nargs="+", required=True, help="JSON-lines manifests whose text is learned")
    sub.add_argument("--vocab-size", type=int, required=True, help="ids at most; 256 are bytes, 4 special")
    sub.add_argument("--output", required=True, help="the .model file to write")

    prepare_sources.add_parsers(commands_of)

    sub = commands_of.add_parser("build", help="codes or text -> a dataset of one task")
    sub.add_argument("--task", choices=TASKS, required=True)
    sub.add_argument("--codes", nargs="+", default=[], help="prefixes of tokenized speech")
    sub.add_argument("--text", nargs="+", default=[], help="manifests with text, for text_lm")
    sub.add_argument("--chat", nargs="+", default=[], help="chat files, for chat; --codes holds their spoken turns")
    sub.add_argument(
        "--modes", nargs="+", choices=MODES, default=MODES, help="user-assistant of chat, S spoken, T written (all)"
    )
    sub.add_argument("--wordings", type=int, default=1, help="wordings of each instruction (default: the first only)")
    sub.add_argument("--loss", choices=LOSSES, default=LOSSES[0], help="default: %(default)s")
    sub.add_argument("--max-length", type=int, help="input positions of a document at most: data.seq_length")
    sub.add_argument(
        "--over-length",
        choices=("reject", "chunk", "split"),
        default="reject",
        help="longer documents: rejected, chunked anywhere, or split at sentences, turns or utterances (%(default)s)",
    )
    sub.add_argument("--tokenizer", required=True, help="SentencePiece .model or Hugging Face tokenizer.json")
    sub.add_argument("--layout", choices=CODEC_LAYOUTS, default="frame", help="default: %(default)s")
    sub.add_argument("--text-vocab-size", type=int, help="text ids of the model (default: the tokenizer's)")
    sub.add_argument("--num-codebooks", type=int, help="the model's: the first n of the codec's (default: all)")
    sub.add_argument("--codebook-size", type=int, help="of the model's codec, for text without codes")
    sub.add_argument(
        "--modality",
        action="append",
        default=[],
        metavar="NAME=START:STOP",
        help="text ids START to STOP - 1 are a modality of their own in the model; may be given several times",
    )
    sub.add_argument("--output", required=True, help="path prefix of the dataset")
    sub.add_argument("--overwrite", action="store_true", help="replace the dataset that is there")

    sub = commands_of.add_parser("inspect", help="what a dataset holds")
    sub.add_argument("--dataset", nargs="+", required=True, help="path prefixes of datasets")
    sub.add_argument("--tokenizer", help="to show a document's text")
    sub.add_argument("--document", type=int, help="which document to show")
    sub.add_argument("--codec", help="to turn the document's codes into sound")
    sub.add_argument("--wav", help="the WAV file to write")

    sub = commands_of.add_parser("speechify", help="turns of a chat file -> speech")
    sub.add_argument("--chat", required=True, help="chat file (JSON lines)")
    sub.add_argument(
        "--synthesizer",
        required=True,
        help="command that reads text on its standard input and writes the audio file {output};"
        " {role} and {voice} are filled in too",
    )
    sub.add_argument("--roles", nargs="+", choices=("user", "assistant"), default=["user", "assistant"])
    sub.add_argument("--voices", nargs="+", default=[], help="what {voice} may be; a side of a chat keeps its own")
    sub.add_argument("--max-characters", type=int, default=600, help="longer turns stay written (%(default)s)")
    sub.add_argument("--workers", type=int, help="processes (default: one per core)")
    sub.add_argument(
        "--max-failed",
        type=float,
        default=MAX_FAILED,
        help="share of turns that may fail before it is an error (default: %(default)g)",
    )
    sub.add_argument("--output", required=True, help="folder for audio, manifest.jsonl and chats.jsonl")
    return parser


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
    for dataset in datasets:
        print(summary(dataset))
        for key, value in dataset.provenance.items():
            print(f"  {key}: {value}")
        if arguments.document is None:
            print(*(f"  {line}" for line in statistics(dataset)), sep="\n")
    if arguments.document is not None:
        _show_document(arguments, datasets[0])
    elif len(datasets) > 1:
        print(*totals(datasets), sep="\n")


def _show_document(arguments: argparse.Namespace, dataset: TokenDataset) -> None:
    if arguments.codec:
        require("nemo", "soundfile", "soxr")
    from megatron_most.audio import load_codec, write_wav
    from megatron_most.data.storage.inspection import audio_of, describe
    from megatron_most.text import load_tokenizer

    if not 0 <= arguments.document < len(dataset):
        raise ConfigError(f"--document={arguments.document}: must be in 0..{len(dataset) - 1}")
    document = dataset.document(arguments.document)
    if arguments.tokenizer:
        tokenizer, built_with = load_tokenizer(arguments.tokenizer), dataset.provenance["tokenizer"]
        if built_with["fingerprint"] != tokenizer.fingerprint:
            other = built_with["name"]
            raise ConfigError(f"--tokenizer={arguments.tokenizer}: the dataset was built with another, {other}")
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
