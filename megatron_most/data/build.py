"""Tokenised speech, or plain text, + a task -> a :class:`~megatron_most.data.indexed.TokenDataset`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_most import __version__
from megatron_most.data.codes import CodecIdentity, CodesDataset
from megatron_most.data.indexed import DatasetWriter, TokenDataset
from megatron_most.data.manifest import read_manifest
from megatron_most.data.tasks import TASKS, TEMPLATE_VERSION, Document, make_document
from megatron_most.errors import ConfigError, DataError
from megatron_most.text import load_tokenizer
from megatron_most.vocab import ModalityRange, VocabLayout


@dataclass
class _Counts:
    modality_positions: dict[str, int]
    documents: int = 0
    positions: int = 0
    target_positions: int = 0
    audio_frames: int = 0

    def add(self, document: Document, num_frames: int, vocab: VocabLayout) -> None:
        self.documents += 1
        self.positions += len(document)
        self.target_positions += int(document.loss_mask.sum())
        self.audio_frames += num_frames
        found = np.bincount(vocab.modality_of(document.ids), minlength=len(self.modality_positions))
        for name, count in zip(self.modality_positions, found.tolist(), strict=True):
            self.modality_positions[name] += count


def build_dataset(
    output: str | Path,
    *,
    task: str,
    tokenizer: str | Path,
    codes: Sequence[str | Path] = (),
    texts: Sequence[str | Path] = (),
    layout: str = "frame",
    text_vocab_size: int | None = None,
    num_codebooks: int | None = None,
    codebook_size: int | None = None,
    further_modalities: Sequence[ModalityRange] = (),
    command: str = "",
) -> TokenDataset:
    """Build one dataset of one task.

    Args:
        codes: prefixes of tokenised speech. For ``text_lm`` their transcripts are the text.
        texts: manifests whose ``text`` is read, for ``text_lm``.
        text_vocab_size: text ids of the model, which may be more than its tokenizer's; None takes the tokenizer's.
        num_codebooks, codebook_size: the model's codec, where no ``codes`` say it.
        further_modalities: ranges of text ids that are modalities of their own in the model.

    Raises:
        ConfigError: arguments that do not fit each other.
        DataError: codes of different codecs, or a document that does not fit the layout (source and id are named).
    """
    if task not in TASKS:
        raise ConfigError(f"task={task!r}: must be one of {', '.join(TASKS)}")
    if texts and task != "text_lm":
        raise ConfigError(f"task={task}: needs tokenised speech (codes), not plain texts")
    if not codes and not texts:
        raise ConfigError(f"task={task}: needs {'texts or codes' if task == 'text_lm' else 'codes'} to build from")
    sources = [CodesDataset(prefix) for prefix in codes]
    codec = _common_codec(sources)
    text_tokenizer = load_tokenizer(tokenizer)
    vocab = _layout(text_tokenizer.vocab_size, codec, layout, text_vocab_size, num_codebooks, codebook_size)
    vocab = dataclasses.replace(vocab, further_modalities=list(further_modalities))

    counts = _Counts(dict.fromkeys(vocab.modality_names, 0))
    with DatasetWriter(output, task, vocab) as writer:
        for where, text, utterance_codes in _examples(sources, texts, with_codes=task != "text_lm"):
            document = make_document(task, vocab, text_tokenizer, text=text, codes=utterance_codes, where=where)
            counts.add(document, 0 if utterance_codes is None else utterance_codes.shape[1], vocab)
            writer.add(document)
        writer.commit(
            {
                "tokenizer": {"name": Path(tokenizer).name, "fingerprint": text_tokenizer.fingerprint},
                "codec": codec.to_dict() if codec else None,
                "template_version": TEMPLATE_VERSION,
                "counts": dataclasses.asdict(counts),
                "sources": [str(source) for source in (*codes, *texts)],
                "tool_version": __version__,
                "command": command,
            }
        )
    return TokenDataset(output)


def _common_codec(sources: Iterable[CodesDataset]) -> CodecIdentity | None:
    first: CodesDataset | None = None
    for source in sources:
        if first is not None and source.codec.fingerprint != first.codec.fingerprint:
            raise DataError(
                f"codes {first.prefix} and {source.prefix} are of different codecs: {first.codec}, {source.codec}"
            )
        first = first or source
    return first.codec if first else None


def _layout(
    tokenizer_size: int,
    codec: CodecIdentity | None,
    layout: str,
    text_vocab_size: int | None,
    num_codebooks: int | None,
    codebook_size: int | None,
) -> VocabLayout:
    text_vocab_size = text_vocab_size or tokenizer_size
    if text_vocab_size < tokenizer_size:
        raise ConfigError(f"text_vocab_size={text_vocab_size}: the tokenizer has {tokenizer_size} ids")
    if codec is None:
        if num_codebooks is None or codebook_size is None:
            raise ConfigError("num_codebooks and codebook_size: needed where no codes say what the model's codec is")
        return VocabLayout(text_vocab_size, num_codebooks, codebook_size, layout)
    for name, given, actual in (
        ("num_codebooks", num_codebooks, codec.num_codebooks),
        ("codebook_size", codebook_size, codec.codebook_size),
    ):
        if given not in (None, actual):
            raise ConfigError(f"{name}={given}: codec {codec.name} has {actual}")
    return VocabLayout(text_vocab_size, codec.num_codebooks, codec.codebook_size, layout)


def _examples(
    sources: Iterable[CodesDataset], texts: Iterable[str | Path], *, with_codes: bool
) -> Iterator[tuple[str, str, np.ndarray | None]]:
    """What errors call an example, its text, and its codes ``[C, F]`` where they are wanted."""
    for source in sources:
        for utterance in source:
            yield f"codes {source.prefix}, {utterance.id}", utterance.text, utterance.codes if with_codes else None
    for manifest in texts:
        for record in read_manifest(manifest, needs_audio=False):
            yield f"{manifest}, {record.id}", record.text, None
