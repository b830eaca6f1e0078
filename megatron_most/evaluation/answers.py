"""Whether a text answers a question, as open-domain question answering judges it."""

from __future__ import annotations

import ast
import re
import string
import unicodedata
from collections.abc import Sequence
from typing import Any

from megatron_most.files import parse_json

_ARTICLES = frozenset(("a", "an", "the"))
_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")


def has_answer(answers: Sequence[str], text: str) -> bool:
    """Whether the words of one of the answers stand in ``text``, one after the other.

    This is the match of dense passage retrieval (Karpukhin et al. 2020, arXiv 2004.04906): texts are decomposed (NFD)
    and lower-cased; a word is a run of letters, digits and combining marks; every other character that is no space is a
    word of its own. Articles stay, and numbers are not converted: ``2`` is not ``two``. An answer without words is no
    answer.
    """
    words = split_words(text)
    return any(_contains(words, split_words(answer)) for answer in answers)


def split_words(text: str) -> list[str]:
    """The words of :func:`has_answer`."""
    words: list[str] = []
    in_word = False
    for letter in unicodedata.normalize("NFD", text).lower():
        kind = unicodedata.category(letter)[0]
        if kind in "LNM":
            if in_word:
                words[-1] += letter
            else:
                words.append(letter)
        elif kind not in "ZC":
            words.append(letter)
        in_word = kind in "LNM"
    return words


def _contains(words: list[str], wanted: list[str]) -> bool:
    count = len(wanted)
    return count > 0 and any(words[start : start + count] == wanted for start in range(len(words) - count + 1))


def is_exact(answers: Sequence[str], text: str) -> bool:
    """Whether ``text`` is one of the answers, apart from case, ASCII punctuation, articles and spaces.

    The normalization is that of SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250).
    """
    return _bare(text) in {_bare(answer) for answer in answers} - {""}


def _bare(text: str) -> str:
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(word for word in plain.split() if word not in _ARTICLES)


def aliases(value: Any) -> list[str]:
    """The answers in a cell of a table: a text, a list, or a text that spells a list in JSON, Python or NumPy.

    NumPy writes ``['a' 'b']``, which Python would read as one text.
    """
    if value is None:
        return []
    if isinstance(value, dict):  # TriviaQA's: value, aliases, normalized_aliases
        return list(dict.fromkeys(one for part in value.values() for one in aliases(part)))
    if not isinstance(value, str):
        parts = value if isinstance(value, (list, tuple)) else [str(value)]
        return list(dict.fromkeys(str(one).strip() for one in parts if str(one).strip()))
    text = value.strip()
    if text.startswith("[") and text.endswith("]"):
        try:
            return aliases(parse_json(text))
        except ValueError:
            if not _QUOTED.sub("", text[1:-1]).strip(", \n\t"):
                return aliases([ast.literal_eval(literal) for literal in _QUOTED.findall(text)])
    return [text] if text else []
