"""Log-probabilities of the targets of documents: what of a document carries loss is scored, the rest is the prompt.

Shape letters: b rows, s positions, n targets of a document, C codebooks, V ids, K codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_most.data.storage.documents import Document
from megatron_most.vocab import NO_CODE, Modality, VocabLayout

Forward = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor],
    tuple[torch.Tensor, torch.Tensor | None],
]
"""``ids [b, s]``, ``codes [b, s, C]``, ``is_padding [b, s]`` -> logits ``[b, s, V]``, and ``[b, s, C, K]`` or None."""

MAX_LOGITS = 1 << 28
"""Logits of a batch: 1 GiB in fp32. A row that has more is a batch of its own."""


@dataclass(frozen=True)
class Likelihood:
    """Of the targets of one document, as natural logarithms; a position's is that of its id and of the codes beside it.

    whole: ``[n]`` float64, with a softmax over the whole vocabulary, as in training.
    own: ``[n]`` float64, with a softmax over the ids (and codes) of the target's own modality, as in generation.
    is_greedy: whether each target is the most probable of its modality.
    """

    whole: np.ndarray
    own: np.ndarray
    is_greedy: bool

    @property
    def count(self) -> int:
        return len(self.own)


class Choices:
    """The ids of each modality that generation may choose.

    Args:
        num_text_ids: the tokenizer's number of ids; the model may have more.
    """

    def __init__(self, vocab: VocabLayout, num_text_ids: int, num_logits: int) -> None:
        modality = vocab.modality_of(torch.arange(num_logits))
        modality[num_text_ids : vocab.text_vocab_size].masked_fill_(
            modality[num_text_ids : vocab.text_vocab_size] == Modality.TEXT, -1
        )
        modality[vocab.size :] = -1  # padding of the table
        self.modality = modality

    def log_softmax(self, logits: torch.Tensor, modality: torch.Tensor) -> torch.Tensor:
        """``logits [n, V]`` -> log-probabilities ``[n, V]`` among the ids of ``modality [n]``, -inf for all others."""
        is_other = self.modality.to(logits.device)[None] != modality[:, None]
        return logits.masked_fill(is_other, float("-inf")).log_softmax(dim=-1)


def likelihoods(
    documents: Sequence[Document], vocab: VocabLayout, num_text_ids: int, forward: Forward, batch_size: int = 32
) -> list[Likelihood]:
    """The likelihood of each document's targets, in their order.

    No document changes the result of another, except by rounding. The first position of a document is never a target.
    """
    found: list[Likelihood | None] = [None] * len(documents)
    for batch in _batches([len(document) for document in documents], vocab.size, batch_size):
        rows = [documents[index] for index in batch]
        logits, code_logits = forward(*_right_padded(rows, vocab))
        choices = Choices(vocab, num_text_ids, logits.shape[-1])
        for row, index in enumerate(batch):
            of_codes = None if code_logits is None else code_logits[row]
            found[index] = _of_document(documents[index], vocab, choices, logits[row], of_codes)
    return [one for one in found if one is not None]


def _of_document(
    document: Document,
    vocab: VocabLayout,
    choices: Choices,
    logits: torch.Tensor,
    code_logits: torch.Tensor | None,
) -> Likelihood:
    """From the logits ``[s, V]`` and ``[s, C, K]`` of its row."""
    places = np.flatnonzero(document.loss_mask)
    assert len(places) and places[0] > 0, "a document to score has targets, and something before them"
    at = torch.from_numpy(places).to(logits.device)
    labels = torch.from_numpy(document.ids.astype(np.int64)).to(logits.device)[at]
    rows = logits[at - 1].double()
    among_own = choices.log_softmax(rows, vocab.modality_of(labels))
    whole = rows.log_softmax(dim=-1).gather(-1, labels[:, None])[:, 0]
    own = among_own.gather(-1, labels[:, None])[:, 0]
    is_greedy = bool((among_own.argmax(dim=-1) == labels).all())
    if code_logits is not None and document.side_codes is not None:
        codes = torch.from_numpy(document.side_codes).to(logits.device)[at]
        code_rows, has_code = code_logits[at - 1].double(), codes != NO_CODE
        targets = codes.clamp(min=0)[..., None]
        whole = whole + (code_rows.log_softmax(-1).gather(-1, targets)[..., 0] * has_code).sum(-1)
        code_rows = code_rows[..., : vocab.codebook_size]
        own = own + (code_rows.log_softmax(-1).gather(-1, targets)[..., 0] * has_code).sum(-1)
        is_greedy &= bool(((code_rows.argmax(-1) == codes) | ~has_code).all())
    return Likelihood(whole.cpu().numpy(), own.cpu().numpy(), is_greedy)


def _batches(lengths: Sequence[int], num_ids: int, batch_size: int) -> Iterator[list[int]]:
    """Indices of documents of similar length, longest first."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        fitting = max(1, MAX_LOGITS // (lengths[order[start]] * num_ids))
        yield order[start : start + min(batch_size, fitting)]
        start += min(batch_size, fitting)


def _right_padded(documents: Sequence[Document], vocab: VocabLayout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``ids [b, s]``, ``codes [b, s, C]`` and ``is_padding [b, s]``, without the last positions, which predict nothing.

    Attention is causal: padding changes nothing.
    """
    longest = max(len(document) for document in documents) - 1
    ids = torch.zeros(len(documents), longest, dtype=torch.long)
    codes = torch.full((len(documents), longest, vocab.num_codebooks), NO_CODE)
    is_padding = torch.ones(len(documents), longest, dtype=torch.bool)
    for row, document in enumerate(documents):
        length = len(document) - 1
        ids[row, :length] = torch.from_numpy(document.ids[:-1].astype(np.int64))
        if (side_codes := document.side_codes) is not None:
            codes[row, :length] = torch.from_numpy(side_codes[:-1])
        is_padding[row, :length] = False
    return ids, codes, is_padding
