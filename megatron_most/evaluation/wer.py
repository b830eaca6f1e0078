"""Word error rate, with the alignment of every utterance so that a report can mark the errors.

    WER = (substitutions + deletions + insertions) / reference words

Errors and words are summed over all utterances before the division: long utterances weigh more than short ones. The
rate can exceed 1. The alignment itself is jiwer's (minimum edit distance).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np

from megatron_most.errors import DataError
from megatron_most.evaluation.normalization import (
    NORMALIZERS,
    check_normalizer,
    default_normalizer,
    normalize_text,
    text_normalizer,
)
from megatron_most.evaluation.scores import bootstrap_interval
from megatron_most.extras import require

__all__ = ["NORMALIZERS", "Edit", "UtteranceErrors", "WordErrors", "normalize_text", "text_normalizer", "word_errors"]

EditKind = Literal["equal", "substitute", "delete", "insert"]


@dataclass(frozen=True)
class Edit:
    """Neighboring words of one kind. ``reference`` is empty for ``insert``, ``hypothesis`` for ``delete``."""

    kind: EditKind
    reference: tuple[str, ...]
    hypothesis: tuple[str, ...]


@dataclass(frozen=True)
class UtteranceErrors:
    """The alignment of one utterance, from the first word to the last."""

    edits: tuple[Edit, ...]

    @property
    def num_reference_words(self) -> int:
        return sum(len(edit.reference) for edit in self.edits)

    @property
    def num_errors(self) -> int:
        # Words are substituted one for one, so the longer side is the number of errors for every kind of edit.
        return sum(max(len(edit.reference), len(edit.hypothesis)) for edit in self.edits if edit.kind != "equal")


@dataclass(frozen=True)
class WordErrors:
    """Error counts summed over utterances, and each utterance's alignment in the order given.

    normalizer: what both texts went through.
    """

    normalizer: str
    hits: int
    substitutions: int
    deletions: int
    insertions: int
    utterances: tuple[UtteranceErrors, ...]

    @property
    def num_reference_words(self) -> int:
        return self.hits + self.substitutions + self.deletions

    @property
    def num_errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def wer(self) -> float:
        """Total word error rate as a fraction (0.25 means 25 %)."""
        return self.num_errors / self.num_reference_words

    def interval(self) -> tuple[float, float] | None:
        """The bootstrap interval of :attr:`wer` over utterances, None for fewer than two of them; see
        :func:`~megatron_most.evaluation.scores.bootstrap_interval`.
        """
        errors = np.array([utterance.num_errors for utterance in self.utterances])
        words = np.array([utterance.num_reference_words for utterance in self.utterances])
        return bootstrap_interval(errors, words)


def word_errors(references: Sequence[str], hypotheses: Sequence[str], normalizer: str | None = None) -> WordErrors:
    """Align each hypothesis with its reference and count the errors.

    Args:
        references: what was said, one text per utterance.
        hypotheses: what was recognized, in the same order. An empty one counts as deletions.
        normalizer: one of :data:`~megatron_most.evaluation.normalization.NORMALIZERS`, for both sides; None chooses by
            the references (:func:`~megatron_most.evaluation.normalization.default_normalizer`).

    Raises:
        DataError: the two lists differ in length, the references hold no word at all, no such normalizer, or one for
            another language.
        MissingExtra: jiwer or the normalizer is not installed.
    """
    normalizer = normalizer or default_normalizer(references)
    check_normalizer(normalizer, references)
    utterances = aligned(references, hypotheses, normalizer)
    if not any(utterance.num_reference_words for utterance in utterances):
        raise DataError(f"word error rate needs reference words, the {len(references)} references have none")
    totals = Counter({kind: 0 for kind in ("equal", "substitute", "delete", "insert")})
    for edit in (edit for utterance in utterances for edit in utterance.edits):
        totals[edit.kind] += max(len(edit.reference), len(edit.hypothesis))
    return WordErrors(normalizer, totals["equal"], totals["substitute"], totals["delete"], totals["insert"], utterances)


def aligned(references: Sequence[str], hypotheses: Sequence[str], normalizer: str) -> tuple[UtteranceErrors, ...]:
    """The alignment of each utterance. Arguments and errors as for :func:`word_errors`; no words are no error here."""
    require("jiwer")
    import jiwer  # lazily: its aligner is a compiled extension that most commands do not need

    if len(references) != len(hypotheses):
        raise DataError(
            f"word error rate needs one hypothesis per reference, got {len(references)} references and"
            f" {len(hypotheses)} hypotheses"
        )
    normalize = text_normalizer(normalizer)
    reference_words = [normalize(text).split() for text in references]
    hypothesis_words = [normalize(text).split() for text in hypotheses]
    already_split = jiwer.Compose([])
    # jiwer's annotations know only texts to split; with transforms that do nothing, it takes lists of words.
    output = jiwer.process_words(
        cast(list[str], reference_words),
        cast(list[str], hypothesis_words),
        reference_transform=already_split,
        hypothesis_transform=already_split,
    )
    return tuple(
        UtteranceErrors(
            tuple(
                Edit(
                    cast(EditKind, chunk.type),
                    tuple(reference[chunk.ref_start_idx : chunk.ref_end_idx]),
                    tuple(hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]),
                )
                for chunk in chunks
            )
        )
        for reference, hypothesis, chunks in zip(reference_words, hypothesis_words, output.alignments, strict=True)
    )
