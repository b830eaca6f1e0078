"""Word error rate against cases counted by hand."""

import pytest

from megatron_most.errors import DataError
from megatron_most.evaluation.wer import NORMALIZERS, Edit, normalize_text, text_normalizer, word_errors


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Red FOX.", "the red fox"),
        ("  well-known — or not?", "well known or not"),
        ("isn\u2019t the dogs' 'bone'", "isn't the dogs bone"),
        ("A_b", "a b"),
        ("Müller zahlt 3", "müller zahlt 3"),
        ("STRASSE Straße", "strasse strasse"),
        ("...", ""),
    ],
)
def test_normalization(text, expected):
    assert normalize_text(text) == expected


def test_totals_are_sums_over_utterances():
    references = ["the red fox sees two birds", "hello world", "a b c", ""]
    hypotheses = ["the fox sees too birds now", "", "a b c", "x"]
    errors = word_errors(references, hypotheses, "basic")
    # red deleted, two -> too, now inserted; hello and world deleted; x inserted
    assert (errors.substitutions, errors.deletions, errors.insertions, errors.hits) == (1, 3, 2, 7)
    assert errors.num_reference_words == 11
    assert errors.wer == pytest.approx(6 / 11)
    assert [utterance.num_errors for utterance in errors.utterances] == [3, 2, 0, 1]
    assert [utterance.num_reference_words for utterance in errors.utterances] == [6, 2, 3, 0]


def test_the_rate_weighs_words_not_utterances_and_can_exceed_one():
    assert word_errors(["a", "b c d e"], ["x", "b c d e"]).wer == pytest.approx(1 / 5)
    assert word_errors(["a"], ["b c d"]).wer == pytest.approx(3.0)


def test_alignment_names_the_words_of_each_error():
    (utterance,) = word_errors(["the red fox sees two birds"], ["the fox sees too birds now"], "basic").utterances
    assert utterance.edits == (
        Edit("equal", ("the",), ("the",)),
        Edit("delete", ("red",), ()),
        Edit("equal", ("fox", "sees"), ("fox", "sees")),
        Edit("substitute", ("two",), ("too",)),
        Edit("equal", ("birds",), ("birds",)),
        Edit("insert", (), ("now",)),
    )


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_case_and_punctuation_are_no_errors(normalizer):
    assert word_errors(["The fox."], ["the fox"], normalizer).wer == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mr. Brown won't pay twenty-one dollars", "mister brown will not pay $21"),
        ("Um, the color of it", "the color of it"),
        ("two nine", "29"),
    ],
)
def test_whispers_normalizer_is_the_default_and_the_librarys(text, expected):
    assert NORMALIZERS[0] == "whisper-english"
    assert text_normalizer("whisper-english")(text) == expected
    assert word_errors([text], [expected]).wer == 0 < word_errors([text], [expected], "basic").wer


def test_a_normalizer_that_is_not_there_is_refused():
    with pytest.raises(DataError, match="normalizer 'melt': must be one of whisper-english, basic"):
        word_errors(["a"], ["a"], "melt")


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(DataError, match="2 references and 1 hypotheses"):
        word_errors(["a", "b"], ["a"])
    with pytest.raises(DataError, match="none"):
        word_errors(["...", ""], ["a", "b"], "basic")
    with pytest.raises(DataError, match="none"):
        word_errors([], [])
