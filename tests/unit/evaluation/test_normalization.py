"""Words of languages that need more than ASCII, and which normalizer they get."""

import unicodedata

import pytest

from megatron_most.errors import DataError
from megatron_most.evaluation.normalization import check_normalizer, default_normalizer, normalize_text
from megatron_most.evaluation.wer import word_errors

MARKED = {
    "Hindi": ("यह किताब मेरी है", "यह किताब मेरा है", 1),
    "Tamil": ("நான் வந்தேன்", "நான் வந்தான்", 1),
    "Turkish": ("Işık güzel görünüyor", "Işık guzel görünüyor", 1),
    "Yoruba": ("ọ́jà tóbi gan", "ọjà tóbi gan", 1),
    "Arabic": ("كَتَبَ الوَلَدُ رِسالَةً", "كُتِبَ الوَلَدُ رِسالَةً", 1),
    "Thai": ("น้ำ ที่ นี่ เย็น", "น้ำ ที นี่ เย็น", 1),
}
"""Reference, hypothesis, and how many of the words that spaces separate differ."""


@pytest.mark.parametrize(("reference", "hypothesis", "wrong"), MARKED.values(), ids=MARKED)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_marks_belong_to_the_words_they_stand_on(reference, hypothesis, wrong, form):
    words, heard = reference.split(), hypothesis.split()
    assert sum(a != b for a, b in zip(words, heard, strict=True)) == wrong  # the case says what it means
    found = word_errors([reference], [unicodedata.normalize(form, hypothesis)])
    assert found.num_reference_words == len(words)
    assert (found.substitutions, found.deletions, found.insertions) == (wrong, 0, 0)
    assert found.wer == wrong / len(words)
    assert word_errors([reference], [unicodedata.normalize(form, reference)]).wer == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("İSTANBUL'da İyi", "istanbul'da iyi"),
        ("İstanbul".lower(), "istanbul"),  # Python leaves a combining dot
        ("किताब, क़लम!", unicodedata.normalize("NFKC", "किताब क़लम")),
        ("می\u200cخواهم", "میخواهم"),  # a joiner shapes letters and separates nothing
        ("co\u00adoperate", "cooperate"),
        ("ﷺ", "صلى الله عليه وسلم"),
        ("❤\ufe0f ok 1\ufe0f\u20e3", "ok 1"),
        ("\u0301a ´b", "a b"),  # a mark on nothing is no word
        ("l\u2019été d'\u0153uvre", "l'été d'\u0153uvre"),
        ("ΌΣΟΣ", "όσοσ"),
    ],
)
def test_words_are_neither_split_nor_broken(text, expected):
    assert normalize_text(text) == expected
    assert normalize_text(normalize_text(text)) == expected


def test_english_gets_whispers_normalizer_and_other_languages_the_basic_one():
    assert default_normalizer(["Mr. Brown won't pay", "at the café " + "or not " * 20]) == "whisper-english"
    for reference, _, _ in MARKED.values():
        assert default_normalizer([reference]) == "basic"
    assert default_normalizer(["Er hat das schöne Haus nie gesehen", "Er wohnt über dem Berg"]) == "basic"
    assert default_normalizer([]) == default_normalizer(["..."]) == "whisper-english"


def test_whispers_normalizer_refuses_what_it_would_break():
    for reference, _, _ in MARKED.values():
        with pytest.raises(DataError, match="normalizer 'whisper-english': must be 'basic', the references are not"):
            word_errors([reference], [reference], "whisper-english")
    check_normalizer("basic", ["यह"])
    check_normalizer("whisper-english", ["the fox"])
