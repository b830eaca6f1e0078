"""What an evaluation asks of a model: how likely something is after a prompt, and what the model answers to a prompt.

Prompts are documents of text and audio, as the templates of training make them
(:mod:`megatron_most.data.building.tasks`), or as :func:`scored` does.

Shape letters: C codebooks, F codec frames.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_most.audio import AudioCodec
from megatron_most.config import ParallelConfig
from megatron_most.data.building.document_builder import DocumentBuilder
from megatron_most.data.storage.documents import Document
from megatron_most.errors import DataError
from megatron_most.evaluation.likelihood import Likelihood, likelihoods
from megatron_most.inference import Decoding, LoadedModel, answer, load_for_generation
from megatron_most.text import TextTokenizer
from megatron_most.vocab import VocabLayout


@dataclass(frozen=True)
class Generated:
    """An answer: text or codes ``[F, C]``. ``at_limit``: its end may be missing."""

    text: str | None = None
    codes: np.ndarray | None = None
    at_limit: bool = False


class Model(Protocol):
    """A model that is evaluated. Ranks that hold it together call it with the same arguments, and get the same."""

    vocab: VocabLayout
    tokenizer: TextTokenizer

    context: int
    """Positions of prompt and answer together."""

    @property
    def codec(self) -> AudioCodec: ...

    @property
    def description(self) -> dict[str, Any]:
        """What tells this model from others: kind, place, step, fingerprints of tokenizer and codec."""
        ...

    def loglikelihood(self, documents: Sequence[Document]) -> list[Likelihood]:
        """Of the targets of each document, after what stands before them; see :func:`scored`."""
        ...

    def generate(self, prompts: Sequence[Document], decoding: Decoding, *, speech: bool = False) -> list[Generated]:
        """The answer to each prompt: text, or with ``speech`` codes, to prompts that end in ``begin_of_audio``."""
        ...


class EvaluatedModel:
    """A native checkpoint or a Hugging Face export as a :class:`Model`."""

    def __init__(self, loaded: LoadedModel, identity: dict[str, Any], batch_size: int = 32) -> None:
        self.loaded, self.identity, self.batch_size = loaded, identity, batch_size
        self.vocab, self.tokenizer, self.context = loaded.config.vocab, loaded.tokenizer, loaded.config.data.seq_length

    @property
    def codec(self) -> AudioCodec:
        return self.loaded.codec

    @property
    def description(self) -> dict[str, Any]:
        return {**self.identity, "tokenizer": self.tokenizer.fingerprint}

    def loglikelihood(self, documents: Sequence[Document]) -> list[Likelihood]:
        forward, num_text_ids = self.loaded.generator.logits, self.tokenizer.vocab_size
        return likelihoods(documents, self.vocab, num_text_ids, forward, self.batch_size)

    def generate(self, prompts: Sequence[Document], decoding: Decoding, *, speech: bool = False) -> list[Generated]:
        form = "spoken" if speech else "written"
        answers = answer(self.loaded, prompts, form, decoding, batch_size=self.batch_size)
        if speech:
            return [Generated(codes=one.codes, at_limit=one.at_limit) for one in answers]
        return [Generated(text=one.text, at_limit=one.at_limit) for one in answers]


def load_model(
    path: str,
    tokenizer: str | None = None,
    codec: str | None = None,
    *,
    layout: ParallelConfig | None = None,
    needs_codec: bool = True,
    batch_size: int = 32,
) -> EvaluatedModel:
    """A checkpoint, the newest of a run, or a Hugging Face export. Arguments and errors as for their loaders."""
    loaded = load_for_generation(path, tokenizer, codec, layout=layout, needs_codec=needs_codec)
    identity: dict[str, Any]
    if loaded.metadata is None:
        files = [(file.name, *_state(file)) for file in sorted(Path(path).glob("*.safetensors"))]
        identity = {"kind": "hf", "files": hashlib.sha256(repr(files).encode()).hexdigest()}
    else:
        identity = {"kind": "native", "step": loaded.metadata.step, "samples": loaded.metadata.consumed_samples}
    if needs_codec:
        identity["codec"] = loaded.codec.fingerprint
    return EvaluatedModel(loaded, {"name": path, **identity}, batch_size)


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


Segments = Sequence[str | np.ndarray]
"""Texts and codes ``[F, C]``, one after the other."""


def scored(
    vocab: VocabLayout, tokenizer: TextTokenizer, prompt: Segments, continuation: Segments, where: str = "document"
) -> Document:
    """A document whose targets are those of ``continuation``, laid out as the ``interleaved`` template lays them out.

    Audio is scored without the ids that begin and end it: they say nothing about what is heard.

    Raises:
        DataError: there is nothing to score, or a text or a recording is empty.
    """
    if not continuation:
        raise DataError(f"{where}: nothing to score")
    builder = DocumentBuilder(vocab, tokenizer, where)
    builder.id(tokenizer.bos_id)
    for segments, is_target in ((prompt, False), (continuation, True)):
        for segment in segments:
            if isinstance(segment, str):
                builder.text(segment, target=is_target)
            else:
                builder.id(vocab.begin_of_audio)
                builder.frames(segment[:, : vocab.num_codebooks], target=is_target)
                builder.id(vocab.end_of_audio)
    return builder.document()


def require_room(model: Model, document: Document, needed: int = 0) -> Document:
    """The document, if it and ``needed`` more positions fit into the model's context.

    Raises:
        DataError: they do not.
    """
    length, context = len(document.ids), model.context
    if length + needed <= context:
        return document
    what = (
        f"a prompt of {length} positions leaves no room for an answer" if needed else f"{length} positions do not fit"
    )
    raise DataError(f"{what}: data.seq_length is {context}")
