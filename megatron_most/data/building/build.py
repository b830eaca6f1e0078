"""Tokenized audio, text or conversations, and a task -> one :class:`TokenDataset`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_most import __version__
from megatron_most.data.building.examples import Examples, TemplateOptions
from megatron_most.data.building.special_tokens import special_tokens
from megatron_most.data.building.tasks import TEMPLATE_VERSION
from megatron_most.data.building.vocab_options import VocabOptions
from megatron_most.data.storage.codes import CodecIdentity, CodesDataset
from megatron_most.data.storage.documents import TASKS, Document
from megatron_most.data.storage.token_dataset import DatasetWriter, TokenDataset
from megatron_most.data.storage.utterances import write_utterances
from megatron_most.errors import ConfigError, DataError
from megatron_most.text import load_tokenizer
from megatron_most.vocab import VocabLayout


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


@dataclass(frozen=True)
class Inputs:
    """The files that a dataset is built from.

    codes: prefixes of tokenized audio. ``text_lm`` uses its transcripts, ``chat`` takes the spoken turns from it.
    texts: manifests, for ``text_lm``; only their ``text`` is read.
    chats: chat files (:mod:`~megatron_most.data.preparation.chat_files`), for ``chat``.
    """

    codes: Sequence[str | Path] = ()
    texts: Sequence[str | Path] = ()
    chats: Sequence[str | Path] = ()

    def check(self, task: str) -> None:
        """Raise :class:`ConfigError` if ``task`` is unknown, lacks its inputs, or does not take these."""
        if task not in TASKS:
            raise ConfigError(f"task={task!r}: must be one of {', '.join(TASKS)}")
        if self.texts and task != "text_lm":
            raise ConfigError(f"task={task}: takes no texts; only text_lm does")
        if self.chats and task != "chat":
            raise ConfigError(f"task={task}: takes no chats; only chat does")
        needed = {"text_lm": ("texts or codes", self.texts or self.codes), "chat": ("chats", self.chats)}
        what, given = needed.get(task, ("codes", self.codes))
        if not given:
            raise ConfigError(f"task={task}: needs {what}")


def build_dataset(
    output: str | Path,
    task: str,
    tokenizer: str | Path,
    inputs: Inputs,
    vocab: VocabOptions | None = None,
    template: TemplateOptions | None = None,
    command: str = "",
) -> TokenDataset:
    """Build one dataset of one task.

    Args:
        output: path prefix of the dataset.
        task: one of :data:`~megatron_most.data.storage.documents.TASKS`.
        tokenizer: the text tokenizer's file or folder.
        vocab: what the tokenizer and the codec do not say about the model's vocabulary.
        template: how documents are made.
        command: the command line, for the provenance.

    Raises:
        ConfigError: the arguments contradict each other.
        DataError: the codes are of different codecs; a document does not fit the layout (source and id are named);
            there is no document.
    """
    inputs.check(task)
    template = template or TemplateOptions()
    codes = [CodesDataset(prefix) for prefix in inputs.codes]
    codec = _common_codec(codes)
    text_tokenizer = load_tokenizer(tokenizer)
    layout = (vocab or VocabOptions()).vocab_of(text_tokenizer.vocab_size, codec)
    markers = special_tokens(layout, text_tokenizer, roles=task == "chat")
    examples = Examples(task, layout, text_tokenizer, template, codes=codes, texts=inputs.texts, chats=inputs.chats)
    counts = _Counts(dict.fromkeys(layout.modality_names, 0))
    with DatasetWriter(output, task, layout) as writer:
        for document in examples:
            counts.add(document, layout)
            writer.add(document)
        if not counts.documents:
            raise DataError(f"{output}: {_why_nothing(task, examples.counts, template)}")
        write_utterances(output, codes)
        writer.commit(
            {
                "tokenizer": {"name": Path(tokenizer).name, "fingerprint": text_tokenizer.fingerprint},
                "codec": codec.to_dict() if codec else None,
                "template_version": TEMPLATE_VERSION,
                "template": dataclasses.asdict(template),
                "special_tokens": markers,
                "counts": dataclasses.asdict(counts) | dict(examples.counts),
                "sources": [str(source) for source in (*inputs.codes, *inputs.texts, *inputs.chats)],
                "licenses": {source.prefix: source.provenance.get("source", {}).get("licenses") for source in codes}
                | {path: dict(sorted(found.items())) for path, found in examples.licenses.items()},
                "tool_version": __version__,
                "command": command,
            }
        )
    return TokenDataset(output)


def _why_nothing(task: str, counts: Mapping[str, int], template: TemplateOptions) -> str:
    if not counts["examples"]:
        if task == "interleaved":
            return (
                "no example was found: interleaved needs recordings of at least two utterances with text, with ids"
                " that differ only in their last number"
            )
        return "no example was found"
    reasons = {
        "rejected": f"longer than max_length={template.limit.positions}",
        "textless": "without a text",
        "unspoken": f"without recordings for any of {', '.join(template.modes)}",
    }
    found = [f"{counts[name]} {reason}" for name, reason in reasons.items() if counts.get(name)]
    return f"none of {counts['examples']} examples became a document: {', '.join(found)}"


def _common_codec(sources: Sequence[CodesDataset]) -> CodecIdentity | None:
    """The codec of all ``sources``; None if there are none."""
    for first, second in itertools.pairwise(sources):
        if first.codec.fingerprint != second.codec.fingerprint:
            raise DataError(
                f"codes {first.prefix} and {second.prefix} are of different codecs: {first.codec}, {second.codec}"
            )
    return sources[0].codec if sources else None
