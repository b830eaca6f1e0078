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


def test_the_interval_is_that_of_the_rates_of_resampled_utterances():
    """Two utterances of one word, one of them wrong: a resample has 0, 1 or 2 errors with probability 1/4, 1/2, 1/4."""
    assert word_errors(["a", "b"], ["a", "x"]).interval() == (0.0, 1.0)
    assert word_errors(["a", "b"], ["a", "b"]).interval() == (0.0, 0.0)
    assert word_errors(["a"], ["x"]).interval() is None


def test_the_interval_is_near_the_binomial_one_and_repeats():
    """100 utterances of one word each with 20 errors: normal approximation 0.2 +- 1.96 * sqrt(0.2 * 0.8 / 100)."""
    references, hypotheses = ["word"] * 100, ["word"] * 80 + ["other"] * 20
    low, high = word_errors(references, hypotheses).interval()
    assert (low, high) == (pytest.approx(0.2 - 0.0784, abs=0.015), pytest.approx(0.2 + 0.0784, abs=0.015))
    assert word_errors(references, hypotheses).interval() == (low, high)


def test_utterances_without_words_are_resampled_with_the_others():
    low, high = word_errors(["", "a b"], ["x", "a b"], "basic").interval()
    assert low == 0.0
    assert high == pytest.approx(0.5)  # each drawn once: the inserted word over two words
