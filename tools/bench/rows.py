"""Synthetic batches of one row: one document, or packed documents as in training."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from megatron_most import platform
from megatron_most.config import RunConfig
from megatron_most.data.loading.batch import Batch, make_batch
from megatron_most.data.loading.blend import Row
from megatron_most.data.storage.documents import TASKS, Document
from megatron_most.vocab import VocabLayout

TARGET_SHARE = 0.6


def half_audio(config: RunConfig) -> Batch:
    """One row that alternates between 64 positions of text and of codec frames, with a target at every position."""
    vocab, length = config.vocab, config.data.seq_length
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab.text_vocab_size, (1, length + 1), generator=generator)
    is_audio = torch.arange(length + 1) // 64 % 2 == 1
    ids[:, is_audio] = vocab.frame
    codes = torch.randint(0, vocab.codebook_size, (1, length + 1, vocab.num_codebooks), generator=generator)
    codes[:, ~is_audio] = -1
    return Batch(
        ids=ids[:, :-1],
        labels=ids[:, 1:],
        loss_mask=torch.ones(1, length),
        modality=vocab.modality_of(ids[:, :-1]),
        is_padding=torch.zeros(1, length, dtype=torch.bool),
        task=torch.zeros(1, length, dtype=torch.long),
        codes=codes[:, :-1],
        code_labels=codes[:, 1:],
        cu_seqlens=None,
    ).to(platform.device())


def packed_documents(config: RunConfig, count: int) -> Batch:
    """A full row of ``count`` documents of unequal lengths. :data:`TARGET_SHARE` of the positions are targets.

    Half of each document is codec frames, before or after its text in turn.

    Args:
        config: with layout ``frame``; ``data.packing`` is ignored.
    """
    random = np.random.default_rng(0)
    shares = random.lognormal(0.0, 0.6, count).cumsum()
    ends = np.round(config.data.seq_length * shares / shares[-1]).astype(np.int64)
    # A document has one more id than positions: the last id is only a label.
    lengths = np.diff(ends, prepend=0) + 1
    assert lengths.min() > 1, "a row too short for so many documents"
    documents = [_document(config.vocab, int(length), bool(i % 2), random) for i, length in enumerate(lengths)]
    starts = np.cumsum(lengths) - lengths
    joined = Document(
        ids=np.concatenate([document.ids for document in documents]),
        loss_mask=np.concatenate([document.loss_mask for document in documents]),
        coded=np.concatenate([document.coded + start for document, start in zip(documents, starts, strict=True)]),
        codes=np.concatenate([document.codes for document in documents]),
    )
    data = dataclasses.replace(config.data, packing=True)
    return make_batch([Row(TASKS.index("asr"), joined, lengths)], config.vocab, data).to(platform.device())


def _document(vocab: VocabLayout, length: int, is_audio_first: bool, random: np.random.Generator) -> Document:
    ids = random.integers(0, vocab.text_vocab_size, length)
    num_coded = length // 2
    coded = np.arange(num_coded) + (0 if is_audio_first else length - num_coded)
    ids[coded] = vocab.frame
    codes = random.integers(0, vocab.codebook_size, (num_coded, vocab.num_codebooks))
    return Document(ids, np.arange(length) >= round((1 - TARGET_SHARE) * length), coded, codes)
