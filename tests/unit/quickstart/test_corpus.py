"""The shipped corpus keeps its held-out promises, and speaking it is reproducible."""

import itertools
import json
import sys

import numpy as np
import pytest
import soundfile

from examples.quickstart import make_corpus, sentences
from examples.quickstart.espeak import Espeak
from megatron_most.errors import ConfigError, DataError

SPLITS = tuple(sentences.SPLIT_SIZES)


@pytest.fixture(scope="module")
def choices():
    return {split: [sentences.choice_of(row["text"]) for row in make_corpus.read_rows(split)] for split in SPLITS}


def pairs(choice):
    """Neighboring words of a sentence, as (slot, word index, next word index)."""
    return {(slot, *pair) for slot, pair in enumerate(itertools.pairwise(choice))}


def test_sizes_and_ids():
    for split, size in sentences.SPLIT_SIZES.items():
        rows = make_corpus.read_rows(split)
        assert [row["id"] for row in rows] == [f"{split}-{index:04d}" for index in range(size)]


def test_no_sentence_occurs_twice(choices):
    everything = [choice for split in SPLITS for choice in choices[split]]
    assert len(set(everything)) == len(everything)


def test_training_never_shows_a_held_out_pair(choices):
    assert not any(any(sentences.held_out_pairs(choice)) for choice in choices["train"])


def test_heldout_s_is_made_of_pairs_that_training_shows(choices):
    trained = set().union(*map(pairs, choices["train"]))
    assert set().union(*map(pairs, choices["heldout_s"])) <= trained


def test_heldout_p_has_two_pairs_that_training_never_shows(choices):
    trained = set().union(*map(pairs, choices["train"]))
    assert all(len(pairs(choice) - trained) >= 2 for choice in choices["heldout_p"])


def test_every_word_occurs_in_training(choices):
    text = " ".join(sentences.text_of(choice) for choice in choices["train"])
    assert set(text.split()) == set(sentences.VOCABULARY)


def test_the_shipped_rows_are_what_the_generator_draws(choices):
    assert sentences.draw_splits() == choices


def test_rows_say_everything_that_determines_the_audio():
    for split in SPLITS:
        for row in make_corpus.read_rows(split):
            assert set(row) == {"id", "text", "speed", "pitch", "offset"}
            assert row["speed"] in sentences.SPEEDS and row["pitch"] in sentences.PITCHES
            assert 0 <= row["offset"] < sentences.MAX_OFFSET


def test_balanced_sentences_show_every_pair_equally_often():
    counts = {}
    for text in sentences.balanced_sentences(repeats=3):
        for pair in pairs(sentences.choice_of(text)):
            counts[pair] = counts.get(pair, 0) + 1
    assert set(counts.values()) == {3} and len(counts) == 5 * 36


def test_other_text_is_no_sentence_of_the_template():
    for text in ("a red fox sees two small birds", "the red fox sees two small", "the fox red sees two small birds"):
        with pytest.raises(ValueError):
            sentences.choice_of(text)


@pytest.mark.parametrize("text", ["the red fox sees two small birds", "the black dog follows nine heavy ships"])
def test_speech_does_not_depend_on_what_was_spoken_before(text):
    engine = Espeak()
    first = engine.synthesize(text, speed=170, pitch=45)
    engine.synthesize("something else", speed=190, pitch=60)
    engine.synthesize("another voice", voice="en-us+f3")
    np.testing.assert_array_equal(engine.synthesize(text, speed=170, pitch=45), first)
    assert first.dtype == np.float32 and 1.0 < len(first) / engine.sample_rate < 4.0


def test_rendered_audio_is_trimmed_normalized_and_offset():
    row = {"text": "the red fox sees two small birds", "speed": 170, "pitch": 50, "offset": 0}
    engine = Espeak()
    audio, later = make_corpus.render(engine, row), make_corpus.render(engine, row | {"offset": 500})
    assert np.abs(audio).max() == pytest.approx(make_corpus.PEAK, abs=1e-3)
    assert not audio[: make_corpus.LEAD_SAMPLES].any() and audio[make_corpus.LEAD_SAMPLES] != 0
    np.testing.assert_array_equal(later[500:], audio)
    assert not later[:500].any()


def test_a_corpus_is_the_same_bytes_again_and_resumes(tmp_path):
    make_corpus.make_split("heldout_s", tmp_path / "a", workers=1, limit=2)
    manifest = make_corpus.make_split("heldout_s", tmp_path / "a", workers=1, limit=4)
    make_corpus.make_split("heldout_s", tmp_path / "b", workers=2, limit=4)
    names = sorted(path.name for path in (tmp_path / "a" / "heldout_s").iterdir())
    assert len(names) == 5  # four files and what they were made from
    for name in names:
        assert (tmp_path / "a" / "heldout_s" / name).read_bytes() == (tmp_path / "b" / "heldout_s" / name).read_bytes()

    entries = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [entry["id"] for entry in entries] == [f"heldout_s-{index:04d}" for index in range(4)]
    for entry in entries:
        info = soundfile.info(entry["audio_filepath"])
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
        assert info.duration == pytest.approx(entry["duration"])


def test_audio_of_another_corpus_version_is_spoken_again(tmp_path, monkeypatch):
    make_corpus.make_split("heldout_s", tmp_path, workers=1, limit=1)
    path = tmp_path / "heldout_s" / "heldout_s-0000.flac"
    path.write_bytes(b"from another version")
    monkeypatch.setattr(make_corpus, "RENDER_VERSION", make_corpus.RENDER_VERSION + 1)
    make_corpus.make_split("heldout_s", tmp_path, workers=1, limit=1)
    assert soundfile.info(path).frames > 0


def test_errors_are_one_line_and_say_what_to_do(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="no voice 'en-nowhere'"):
        Espeak().synthesize("the red fox", voice="en-nowhere")
    monkeypatch.setattr(make_corpus, "CORPUS_DIR", tmp_path)
    with pytest.raises(DataError, match="train.jsonl"):
        make_corpus.read_rows("train")
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ConfigError, match=r"needs espeakng_loader.*megatron-most\[quickstart\]"):
        Espeak()
