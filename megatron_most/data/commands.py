"""What ``tools/prepare_data.py`` does, a function for each of its commands."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

from megatron_most.audio import load_codec, write_wav
from megatron_most.cli import require_positive
from megatron_most.data.building.build import Inputs, build_dataset
from megatron_most.data.building.examples import TemplateOptions
from megatron_most.data.building.instructions import FIRST_INSTRUCTIONS
from megatron_most.data.building.length_limit import LengthLimit
from megatron_most.data.building.vocab_options import VocabOptions
from megatron_most.data.preparation.manifest import read_manifest
from megatron_most.data.preparation.speechify import speak_chats
from megatron_most.data.source_commands import manifest, tokenize
from megatron_most.data.storage.inspection import audio_of, describe, statistics, summary, totals
from megatron_most.data.storage.token_dataset import TokenDataset
from megatron_most.errors import ConfigError
from megatron_most.files import require_writable
from megatron_most.text import load_tokenizer, train_sentencepiece
from megatron_most.vocab import ModalityRange


def train_tokenizer(arguments: argparse.Namespace, command: str) -> None:
    require_writable(arguments.output)
    texts = [record.text for path in arguments.manifest for record in read_manifest(path, needs_audio=False)]
    tokenizer = train_sentencepiece(itertools.chain(texts, FIRST_INSTRUCTIONS), arguments.output, arguments.vocab_size)
    print(f"{arguments.output}: {tokenizer.vocab_size} ids from {len(texts)} texts")


def build(arguments: argparse.Namespace, command: str) -> None:
    require_positive(arguments, "text_vocab_size", "num_codebooks", "codebook_size", "max_length")
    require_writable(f"{arguments.output}.json")
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
        command,
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


def inspect(arguments: argparse.Namespace, command: str) -> None:
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
    if not 0 <= arguments.document < len(dataset):
        raise ConfigError(f"--document={arguments.document}: must be in 0..{len(dataset) - 1}")
    document = dataset.document(arguments.document)
    if arguments.tokenizer:
        shown = describe(document, dataset.vocab, load_tokenizer(arguments.tokenizer))
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


def speechify(arguments: argparse.Namespace, command: str) -> None:
    require_positive(arguments, "workers", "max_characters")
    counts = speak_chats(
        arguments.chat,
        arguments.output,
        arguments.synthesiser,
        roles=arguments.roles,
        voices=arguments.voices,
        max_characters=arguments.max_characters,
        workers=arguments.workers,
    )
    print(f"{arguments.output}: {', '.join(f'{count} {what}' for what, count in counts.items())}")


COMMANDS: dict[str, Callable[[argparse.Namespace, str], None]] = {
    "tokenizer": train_tokenizer,
    "manifest": manifest,
    "tokenize": tokenize,
    "build": build,
    "inspect": inspect,
    "speechify": speechify,
}


def _modality_range(text: str) -> ModalityRange:
    """``NAME=START:STOP`` -> the range; its rules are :class:`VocabLayout`'s."""
    name, _, numbers = text.partition("=")
    try:
        start, stop = map(int, numbers.split(":"))
    except ValueError:
        raise ConfigError(f"--modality={text}: must be NAME=START:STOP, ids START to STOP - 1") from None
    return ModalityRange(name, start, stop)
