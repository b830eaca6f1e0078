"""Word error rate, with the alignment of every utterance so that a report can mark the errors.

    WER = (substitutions + deletions + insertions) / reference words

both summed over all utterances before the division: long utterances weigh more than short ones, and the rate can
exceed 1. The alignment itself is jiwer's (minimum edit distance).

Rates compare only where texts were normalized alike. ``whisper-english`` is Whisper's normalizer for English, which
published rates for English are computed with: it writes numbers in digits, resolves contractions and British spellings,
and drops fillers. It joins numbers that follow each other ("two nine" becomes "29"). ``basic`` is
:func:`normalize_text`, for any language.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_most.errors import DataError
from megatron_most.extras import require

NORMALIZERS = ("whisper-english", "basic")
"""What a text may be normalized with, the default first."""

EditKind = Literal["equal", "substitute", "delete", "insert"]

_NOT_IN_A_WORD = re.compile(r"[^\w\s']|_|(?<!\w)'|'(?!\w)")


def normalize_text(text: str) -> str:
    """Lower-case words separated by single spaces: no punctuation but apostrophes inside words, no accents changed.

    Hyphens and dashes separate words. Numbers stay as they are written: ``2`` and ``two`` differ.
    """
    folded = unicodedata.normalize("NFKC", text).replace("\u2019", "'").casefold()
    return " ".join(_NOT_IN_A_WORD.sub(" ", folded).split())


@functools.cache
def text_normalizer(name: str) -> Callable[[str], str]:
    """The function that ``name`` of :data:`NORMALIZERS` stands for: text -> words with spaces between them.

    Raises:
        DataError: there is none of that name.
        MissingExtra: Whisper's normalizer is asked for and not installed.
    """
    if name == "basic":
        return normalize_text
    if name != "whisper-english":
        raise DataError(f"normalizer {name!r}: must be one of {', '.join(NORMALIZERS)}")
    require("whisper_normalizer")
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()


@dataclass(frozen=True)
class Edit:
    """A run of neighboring words with the same fate: ``reference`` is empty for ``insert``, ``hypothesis`` for
    ``delete``."""

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
        # Words of a run are substituted one for one, so the longer side counts every kind of run.
        return sum(max(len(edit.reference), len(edit.hypothesis)) for edit in self.edits if edit.kind != "equal")


@dataclass(frozen=True)
class WordErrors:
    """Error counts summed over utterances, and each utterance's alignment in the order given."""

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


def word_errors(references: Sequence[str], hypotheses: Sequence[str], normalizer: str = NORMALIZERS[0]) -> WordErrors:
    """Align each hypothesis with its reference and count the errors.

    Args:
        references: what was said, one text per utterance.
        hypotheses: what was recognized, in the same order. Empty texts are fine and count as deletions.
        normalizer: of :data:`NORMALIZERS`, for both sides.

    Raises:
        DataError: the two lists differ in length, the references hold no word at all, or no such normalizer.
        MissingExtra: jiwer or the normalizer is not installed.
    """
    require("jiwer")
    import jiwer  # lazily: its aligner is a compiled extension that most commands do not need

    if len(references) != len(hypotheses):
        raise DataError(f"word error rate needs one hypothesis per reference, got {len(references)} references "
                        f"and {len(hypotheses)} hypotheses")  # fmt: skip
    normalize = text_normalizer(normalizer)
    reference_words = [normalize(text).split() for text in references]
    hypothesis_words = [normalize(text).split() for text in hypotheses]
    if not any(reference_words):
        raise DataError(f"word error rate needs reference words, the {len(references)} references have none")

    already_split = jiwer.Compose([])
    output = jiwer.process_words(
        reference_words, hypothesis_words, reference_transform=already_split, hypothesis_transform=already_split
    )
    utterances = tuple(
        UtteranceErrors(
            tuple(
                Edit(
                    chunk.type,
                    tuple(reference[chunk.ref_start_idx : chunk.ref_end_idx]),
                    tuple(hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]),
                )
                for chunk in chunks
            )
        )
        for reference, hypothesis, chunks in zip(reference_words, hypothesis_words, output.alignments, strict=True)
    )
    return WordErrors(output.hits, output.substitutions, output.deletions, output.insertions, utterances)
