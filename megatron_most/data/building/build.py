"""Tokenized speech, plain texts and conversations + a task -> one :class:`TokenDataset`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_most import __version__
from megatron_most.data.building.examples import Examples, TemplateOptions
from megatron_most.data.building.special_tokens import special_tokens
from megatron_most.data.building.tasks import TEMPLATE_VERSION
from megatron_most.data.storage.codes import CodecIdentity, CodesDataset
from megatron_most.data.storage.documents import TASKS, Document
from megatron_most.data.storage.token_dataset import DatasetWriter, TokenDataset
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

    def add(self, document: Document, vocab: VocabLayout) -> None:
        self.documents += 1
        self.positions += len(document)
        self.target_positions += int(document.loss_mask.sum())
        self.audio_frames += int(vocab.codec_layout.is_leading(document.ids).sum())
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
    chats: Sequence[str | Path] = (),
    template: TemplateOptions | None = None,
    layout: str = "frame",
    text_vocab_size: int | None = None,
    num_codebooks: int | None = None,
    codebook_size: int | None = None,
    further_modalities: Sequence[ModalityRange] = (),
    command: str = "",
) -> TokenDataset:
    """Build one dataset of one task.

    Args:
        codes: prefixes of tokenized speech. For ``text_lm`` their transcripts are the text.
        texts: manifests whose ``text`` is read, for ``text_lm``.
        chats: chat files (:mod:`~megatron_most.data.preparation.chat_files`), for ``chat``; ``codes`` hold the spoken
            turns.
        template: how documents are made.
        text_vocab_size: text ids of the model, which may be more than its tokenizer's; None takes the tokenizer's.
        num_codebooks: how many of the codec's codebooks the model knows, from the first on; None takes all. Needed
            where no ``codes`` say what the codec has.
        codebook_size: the codec's, where no ``codes`` say it.
        further_modalities: ranges of text ids that are modalities of their own in the model.

    Raises:
        ConfigError: arguments that do not fit each other.
        DataError: codes of different codecs; a document that does not fit the layout (source and id are named); no
            document at all.
    """
    _check_sources(task, codes, texts, chats)
    template = template or TemplateOptions()
    sources = [CodesDataset(prefix) for prefix in codes]
    codec = _common_codec(sources)
    text_tokenizer = load_tokenizer(tokenizer)
    vocab = _layout(text_tokenizer.vocab_size, codec, layout, text_vocab_size, num_codebooks, codebook_size)
    vocab = dataclasses.replace(vocab, further_modalities=list(further_modalities))
    tokens = special_tokens(vocab, text_tokenizer, roles=task == "chat")
    examples = Examples(task, vocab, text_tokenizer, template, codes=sources, texts=texts, chats=chats)

    counts = _Counts(dict.fromkeys(vocab.modality_names, 0))
    with DatasetWriter(output, task, vocab) as writer:
        for document in examples:
            counts.add(document, vocab)
            writer.add(document)
        if not counts.documents:
            raise DataError(f"{output}: {_why_nothing(task, examples.counts, template)}")
        writer.commit(
            {
                "tokenizer": {"name": Path(tokenizer).name, "fingerprint": text_tokenizer.fingerprint},
                "codec": codec.to_dict() if codec else None,
                "template_version": TEMPLATE_VERSION,
                "template": dataclasses.asdict(template),
                "special_tokens": tokens,
                "counts": dataclasses.asdict(counts) | dict(examples.counts),
                "sources": [str(source) for source in (*codes, *texts, *chats)],
                "licenses": {source.prefix: source.provenance.get("source", {}).get("licenses") for source in sources}
                | {path: dict(sorted(found.items())) for path, found in examples.licenses.items()},
                "tool_version": __version__,
                "command": command,
            }
        )
    return TokenDataset(output)


def _why_nothing(task: str, counts: Mapping[str, int], template: TemplateOptions) -> str:
    if not counts["examples"]:
        return "no example was found" + (
            ": interleaved needs recordings of at least two utterances with text, with ids that differ in their last"
            " number only"
            if task == "interleaved"
            else ""
        )
    reasons = {
        "rejected": f"longer than max_length={template.limit.positions}",
        "textless": "without a text",
        "unspoken": f"without the recordings for any of {', '.join(template.modes)}",
    }
    found = [f"{counts[name]} {reason}" for name, reason in reasons.items() if counts.get(name)]
    return f"none of {counts['examples']} examples became a document: {', '.join(found)}"


def _check_sources(
    task: str, codes: Sequence[str | Path], texts: Sequence[str | Path], chats: Sequence[str | Path]
) -> None:
    if task not in TASKS:
        raise ConfigError(f"task={task!r}: must be one of {', '.join(TASKS)}")
    if texts and task != "text_lm":
        raise ConfigError(f"task={task}: needs tokenized speech (codes), not plain texts")
    if chats and task != "chat":
        raise ConfigError(f"task={task}: takes no chat files")
    needed = {"text_lm": ("texts or codes", texts or codes), "chat": ("chats", chats)}
    what, given = needed.get(task, ("codes", codes))
    if not given:
        raise ConfigError(f"task={task}: needs {what} to build from")


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
    if codebook_size not in (None, codec.codebook_size):
        raise ConfigError(f"codebook_size={codebook_size}: codec {codec.name} has {codec.codebook_size}")
    if num_codebooks is not None and num_codebooks > codec.num_codebooks:
        raise ConfigError(f"num_codebooks={num_codebooks}: codec {codec.name} has {codec.num_codebooks}")
    return VocabLayout(text_vocab_size, num_codebooks or codec.num_codebooks, codec.codebook_size, layout)
