"""What a text goes through before its words are compared. Rates compare only where both texts were normalized alike.

``whisper-english`` is Whisper's normalizer for English, which published rates for English are computed with. It writes
numbers in digits, resolves contractions and British spellings, and drops fillers. It joins numbers that follow each
other ("two nine" becomes "29"), and it drops the accents and vowel signs that other languages need. ``basic`` is
:func:`normalize_text`, for any language.
"""

from __future__ import annotations

import functools
import re
import sys
import unicodedata
from collections.abc import Callable, Sequence

from megatron_most.errors import DataError
from megatron_most.extras import require

NORMALIZERS = ("whisper-english", "basic")

_ENGLISH_SHARE = 0.05
"""English has few words with a letter outside of ASCII ("café"); German has one in ten, and others have more."""

_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u180b-\u180f\u200c-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef]"
)
"""Characters that choose a glyph, a line break or a direction: joiners, soft hyphens, variation selectors."""


def normalize_text(text: str) -> str:
    """Lower-case words separated by single spaces: no punctuation but apostrophes inside words, no accents changed.

    A word is letters, digits and the combining marks on them (Unicode categories L, N, Mn and Mc): the vowel signs of
    Hindi and the tone marks of Yoruba belong to words. Hyphens and dashes separate words. Numbers stay as they are
    written: ``2`` and ``two`` differ. Turkish ``İ`` becomes ``i``, and so does ``I``, as in most languages.
    A language that writes no spaces between words, such as Thai, has one word per phrase.
    """
    visible = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).replace("\u2019", "'")
    # Folding case may decompose letters: compose them again. İ becomes an i with a second dot, which nobody writes.
    folded = unicodedata.normalize("NFKC", visible.casefold()).replace("i\u0307", "i")
    return " ".join(_word().findall(folded))


@functools.cache
def _word() -> re.Pattern[str]:
    r"""A word, for case-folded text; Python's ``\w`` leaves out combining marks."""
    marks = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) in ("Mn", "Mc"))
    return re.compile(rf"[^\W_](?:[^\W_]|[{marks}]|'(?=[^\W_]))*")


def default_normalizer(references: Sequence[str]) -> str:
    """``whisper-english`` for English references, ``basic`` for those of other languages.

    References are taken for English if at most one word in 20 has a letter outside of ASCII. Languages that are written
    with ASCII letters alone, such as Indonesian, cannot be told from English that way.
    """
    return "basic" if _foreign_share(references)[0] > _ENGLISH_SHARE else "whisper-english"


@functools.cache
def text_normalizer(name: str) -> Callable[[str], str]:
    """The normalizer of that name: text -> words separated by spaces.

    Raises:
        DataError: ``name`` is not in :data:`NORMALIZERS`.
        MissingExtra: ``whisper-english`` is asked for and not installed.
    """
    if name == "basic":
        return normalize_text
    if name != "whisper-english":
        raise DataError(f"normalizer {name!r}: must be one of {', '.join(NORMALIZERS)}")
    require("whisper_normalizer")
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()


def check_normalizer(name: str, references: Sequence[str]) -> None:
    """Raise :class:`DataError` when ``name`` is for English and the references are not."""
    share, example = _foreign_share(references)
    if name == "whisper-english" and share > _ENGLISH_SHARE:
        raise DataError(
            f"normalizer {name!r}: must be 'basic', the references are not English: {share:.0%} of their words have"
            f" letters outside of ASCII, such as {example!r}"
        )


def _foreign_share(references: Sequence[str]) -> tuple[float, str]:
    """Share of words with a letter or mark outside of ASCII, and the first of them."""
    words = [word for text in references for word in normalize_text(text).split()]
    foreign = [word for word in words if not word.isascii()]
    return (len(foreign) / len(words), foreign[0]) if foreign else (0.0, "")
