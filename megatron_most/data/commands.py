"""What ``tools/prepare_data.py`` does, a function for each of its commands."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import numpy as np

from megatron_most.audio import load_codec, write_wav
from megatron_most.cli import require_positive
from megatron_most.data.build import build_dataset
from megatron_most.data.indexed import TokenDataset
from megatron_most.data.manifest import read_manifest
from megatron_most.data.tasks import INSTRUCTIONS, Document
from megatron_most.data.tokenise import tokenise
from megatron_most.errors import ConfigError
from megatron_most.files import require_writable
from megatron_most.text import TextTokenizer, load_tokenizer, train_sentencepiece
from megatron_most.vocab import Modality, ModalityRange, VocabLayout


def train_tokenizer(arguments: argparse.Namespace, command: str) -> None:
    require_writable(arguments.output)
    texts = [record.text for path in arguments.manifest for record in read_manifest(path, needs_audio=False)]
    tokenizer = train_sentencepiece(itertools.chain(texts, INSTRUCTIONS), arguments.output, arguments.vocab_size)
    print(f"{arguments.output}: {tokenizer.vocab_size} ids from {len(texts)} texts")


def tokenize(arguments: argparse.Namespace, command: str) -> None:
    require_positive(arguments, "workers")
    require_writable(f"{arguments.output}.json")
    codes = tokenise(arguments.manifest, arguments.codec, arguments.output, workers=arguments.workers, command=command)
    print(f"{arguments.output}: {len(codes)} utterances, {codes.seconds / 3600:.2f} h, codec {codes.codec.name}")


def build(arguments: argparse.Namespace, command: str) -> None:
    require_positive(arguments, "text_vocab_size", "num_codebooks", "codebook_size")
    require_writable(f"{arguments.output}.json")
    dataset = build_dataset(
        arguments.output,
        task=arguments.task,
        tokenizer=arguments.tokenizer,
        codes=arguments.codes,
        texts=arguments.text,
        layout=arguments.layout,
        text_vocab_size=arguments.text_vocab_size,
        num_codebooks=arguments.num_codebooks,
        codebook_size=arguments.codebook_size,
        further_modalities=[_modality_range(text) for text in arguments.modality],
        command=command,
    )
    print(_summary(dataset))


def inspect(arguments: argparse.Namespace, command: str) -> None:
    dataset = TokenDataset(arguments.dataset)
    print(_summary(dataset))
    for key, value in dataset.provenance.items():
        print(f"  {key}: {value}")
    quantiles = np.percentile(dataset.lengths, (0, 50, 100)).astype(int) if len(dataset) else ()
    print(f"  positions a document (least, median, most): {', '.join(map(str, quantiles))}")
    if arguments.document is None:
        if arguments.codec or arguments.wav:
            raise ConfigError("--codec and --wav: need --document")
        return
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
        codes = _audio(document, dataset.vocab)
        codec = load_codec(arguments.codec)
        made_with = dataset.provenance["codec"] or {}
        if made_with.get("fingerprint") != codec.fingerprint:
            name = made_with.get("name")
            raise ConfigError(f"--codec={arguments.codec}: the dataset was made with another codec, {name}")
        write_wav(arguments.wav, codec.decode(codes), codec.sample_rate)
        print(f"{arguments.wav}: {codes.shape[1] / codec.frame_rate:.2f} s")


COMMANDS: dict[str, Callable[[argparse.Namespace, str], None]] = {
    "tokenizer": train_tokenizer,
    "tokenize": tokenize,
    "build": build,
    "inspect": inspect,
}


def describe(document: Document, vocab: VocabLayout, tokenizer: TextTokenizer) -> str:
    """One line: text as text, audio as a number of frames, other modalities as a number of ids, targets in brackets."""
    parts = []
    modality = vocab.modality_of(document.ids)
    edges = np.flatnonzero((np.diff(modality) != 0) | np.diff(document.loss_mask)) + 1
    for start, end in itertools.pairwise((0, *edges.tolist(), len(document))):
        if modality[start] == Modality.TEXT:
            part = tokenizer.decode(document.ids[start:end].tolist())
        elif modality[start] == Modality.AUDIO:
            frames = vocab.codec_layout.is_leading(document.ids[start:end]).sum()
            part = f"<{frames} frames>" if frames else ""
        else:
            part = f"<{end - start} {vocab.modality_names[modality[start]]}>"
        if part:
            parts.append(f"[{part}]" if document.loss_mask[start] else part)
    return " ".join(parts)


def _audio(document: Document, vocab: VocabLayout) -> np.ndarray:
    """The codes ``[C, F]`` of a document."""
    positions = np.flatnonzero(document.ids >= vocab.frame)
    if not positions.size:
        raise ConfigError("--codec: the document holds no audio")
    side_codes = np.empty(0) if document.codes is None else document.codes[positions]
    return vocab.codec_layout.decode(document.ids[positions], side_codes)


def _modality_range(text: str) -> ModalityRange:
    """``NAME=START:STOP`` -> the range; its rules are :class:`VocabLayout`'s."""
    name, _, numbers = text.partition("=")
    try:
        start, stop = map(int, numbers.split(":"))
    except ValueError:
        raise ConfigError(f"--modality={text}: must be NAME=START:STOP, ids START to STOP - 1") from None
    return ModalityRange(name, start, stop)


def _summary(dataset: TokenDataset) -> str:
    counts = dataset.provenance["counts"]
    return (
        f"{dataset.prefix}: task {dataset.task}, layout {dataset.vocab.layout}, {counts['documents']} documents,"
        f" {counts['positions']} positions ({counts['target_positions']} with loss),"
        f" {counts['audio_frames']} audio frames"
    )
