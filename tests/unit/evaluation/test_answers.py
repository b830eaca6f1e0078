"""Matching of answers against a table made by hand: accents, articles, numbers, aliases, punctuation, scripts."""

from __future__ import annotations

import pytest

from megatron_most.evaluation.answers import aliases, has_answer, is_exact, split_words

CASES = [
    # accents and composition
    (["Beyoncé"], "It was Beyoncé.", True),
    (["Beyonce\u0301"], "It was Beyonc\u00e9.", True),
    (["Beyonc\u00e9"], "It was Beyonce\u0301.", True),
    (["Beyonce"], "It was Beyoncé.", False),  # accents are kept
    (["Beyoncé"], "It was Beyonce.", False),
    (["Zürich"], "in ZÜRICH today", True),
    (["São Paulo"], "são paulo, Brazil", True),
    (["naïve"], "a naïve answer", True),
    # articles stay
    (["The Beatles"], "I think the Beatles did.", True),
    (["The Beatles"], "I think Beatles did.", False),
    (["Beatles"], "The Beatles.", True),
    (["a cat"], "a black cat", False),
    (["an apple"], "An Apple a day", True),
    (["Who"], "the who", True),
    # numbers are texts
    (["2"], "There are 2 of them.", True),
    (["2"], "There are two of them.", False),
    (["two"], "There are 2 of them.", False),
    (["2"], "in 2020", False),
    (["1969"], "It was July 20, 1969.", True),
    (["1,000"], "about 1,000 people", True),
    (["1000"], "about 1,000 people", False),
    (["1,000"], "about 1000 people", False),
    (["3.14"], "pi is 3.14", True),
    (["3.14"], "pi is 3 . 14", True),  # punctuation stands alone in both
    (["3.14"], "pi is 3,14", False),
    (["50%"], "50 % of it", True),
    (["½"], "½ a cup", True),
    (["$5"], "it costs $ 5", True),
    (["²"], "m²", False),  # a digit inside a word
    # aliases
    (["USA", "United States"], "the United States of America", True),
    (["U.S.", "USA"], "in the U.S. today", True),
    (["U.S."], "in the US today", False),
    (["US"], "in the U.S. today", False),
    (["Thames", "River Thames"], "the river thames", True),
    (["Ada", "Bob"], "Carol and Dave", False),
    ([], "anything", False),
    ([""], "anything", False),  # nothing is no answer
    (["..."], "anything", False),
    (["...", "any"], "any thing", True),
    # whole words, in order, side by side
    (["art"], "a party", False),
    (["Paris"], "Parisian", False),
    (["New York"], "new york city", True),
    (["New York"], "york is new", False),
    (["New York"], "New, York", False),
    (["John Smith"], "John Q. Smith", False),
    (["Smith"], "John Q. Smith", True),
    # case and white space
    (["PARIS"], "paris", True),
    (["new  york"], "new\tyork\n", True),
    (["new york"], "new\u00a0york", True),
    (["İstanbul"], "i\u0307stanbul", True),
    # punctuation
    (["O'Brien"], "Mr. O'Brien said", True),
    (["O'Brien"], "Mr. O\u2019Brien said", False),  # another apostrophe
    (["OBrien"], "Mr. O'Brien said", False),
    (["rock-n-roll"], "some rock - n - roll", True),
    (["rock and roll"], "rock-and-roll", False),
    (["AC/DC"], "by AC/DC!", True),
    (["Yes!"], "yes", False),
    (["snake_case"], "snake_case", True),
    # other scripts
    (["東京"], "東京", True),
    (["東京"], "東京都", False),  # no spaces: one word
    (["Москва"], "столица москва", True),
    (["हिन्दी"], "भाषा हिन्दी है", True),  # marks belong to words
]


def test_there_are_sixty_cases():
    assert len(CASES) >= 60 and len({repr(case) for case in CASES}) == len(CASES)


@pytest.mark.parametrize(("answers", "text", "expected"), CASES)
def test_has_answer(answers, text, expected):
    assert has_answer(answers, text) is expected


def test_words_are_runs_of_letters_digits_and_marks():
    assert split_words("Don't pay $3.50 — or 50%!") == [
        *("don", "'", "t", "pay", "$", "3", ".", "50", "—", "or", "50", "%", "!")
    ]


@pytest.mark.parametrize(
    ("answers", "text", "expected"),
    [
        (["The Beatles"], "beatles", True),
        (["beatles"], "The Beatles!", True),
        (["O'Brien"], "obrien", True),
        (["New York"], "New  York.", True),
        (["New York"], "it is New York", False),
        (["a", "b"], "the", False),  # nothing is left of both
        (["one", "two"], "Two", True),
    ],
)
def test_exact_match(answers, text, expected):
    assert is_exact(answers, text) is expected


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("Paris", ["Paris"]),
        ('["Paris", "City of Light"]', ["Paris", "City of Light"]),
        ("['Paris', \"O'Brien\"]", ["Paris", "O'Brien"]),
        ("['Paris' 'City of Light'\n 'x']", ["Paris", "City of Light", "x"]),  # NumPy's
        ("['it\\'s']", ["it's"]),
        ("[sic]", ["[sic]"]),
        ("", []),
        (None, []),
        (42, ["42"]),
        (["a", "a", " "], ["a"]),
        ({"value": "Paris", "aliases": ["Paris", "Lutetia"], "type": None}, ["Paris", "Lutetia"]),
    ],
)
def test_aliases_are_read_however_a_table_spells_them(cell, expected):
    assert aliases(cell) == expected
