"""Word error rate, with the alignment of every utterance so that a report can mark the errors.

    WER = (substitutions + deletions + insertions) / reference words

Errors and words are summed over all utterances before the division: long utterances weigh more than short ones. The
rate can exceed 1. The alignment itself is jiwer's (minimum edit distance).
"""

from __future__ import annotations

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
from megatron_most.extras import require

__all__ = ["NORMALIZERS", "Edit", "UtteranceErrors", "WordErrors", "normalize_text", "text_normalizer", "word_errors"]

EditKind = Literal["equal", "substitute", "delete", "insert"]

CONFIDENCE = 0.95
_RESAMPLES = 10_000
_SEED = 0


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
        """Percentile bootstrap interval of :attr:`wer` at :data:`CONFIDENCE`; None for fewer than two utterances.

        Utterances are drawn with replacement (Bisani and Ney 2004, https://doi.org/10.1109/ICASSP.2004.1326009), from a
        fixed seed: the same errors give the same interval. It says how much the rate depends on the choice of
        utterances, and nothing about other training runs.
        """
        errors = np.array([utterance.num_errors for utterance in self.utterances])
        words = np.array([utterance.num_reference_words for utterance in self.utterances])
        count = len(errors)
        if count < 2:
            return None
        random = np.random.default_rng(_SEED)
        rates = []
        for _ in range(_RESAMPLES):
            times = np.bincount(random.integers(0, count, count), minlength=count)
            if num_words := int(times @ words):  # only utterances without words may have been drawn
                rates.append(int(times @ errors) / num_words)
        low, high = np.quantile(rates, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return float(low), float(high)


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
    require("jiwer")
    import jiwer  # lazily: its aligner is a compiled extension that most commands do not need

    if len(references) != len(hypotheses):
        raise DataError(
            f"word error rate needs one hypothesis per reference, got {len(references)} references and"
            f" {len(hypotheses)} hypotheses"
        )
    name = normalizer or default_normalizer(references)
    normalize = text_normalizer(name)
    check_normalizer(name, references)
    reference_words = [normalize(text).split() for text in references]
    hypothesis_words = [normalize(text).split() for text in hypotheses]
    if not any(reference_words):
        raise DataError(f"word error rate needs reference words, the {len(references)} references have none")

    already_split = jiwer.Compose([])
    # jiwer's annotations know only texts to split; with transforms that do nothing, it takes lists of words.
    output = jiwer.process_words(
        cast(list[str], reference_words),
        cast(list[str], hypothesis_words),
        reference_transform=already_split,
        hypothesis_transform=already_split,
    )
    utterances = tuple(
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
    return WordErrors(name, output.hits, output.substitutions, output.deletions, output.insertions, utterances)
