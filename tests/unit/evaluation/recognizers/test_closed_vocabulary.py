"""The pocketsphinx recognizer: a clean sentence, its language model, and what it refuses."""

import sys

import numpy as np
import pytest

from examples.quickstart.espeak import Espeak
from megatron_most.errors import ConfigError, DataError
from megatron_most.evaluation.recognizers.closed_vocabulary import PocketsphinxRecognizer, arpa_language_model

SENTENCES = ["the red fox sees two small birds", "the black dog follows nine heavy ships"]


@pytest.fixture(scope="module")
def recognizer():
    return PocketsphinxRecognizer(SENTENCES)


@pytest.mark.parametrize("sentence", SENTENCES)
def test_a_clean_sentence_is_recognized_at_any_sample_rate(recognizer, sentence):
    engine = Espeak()
    audio = engine.synthesize(sentence)
    assert engine.sample_rate != 16000  # so this resamples
    assert recognizer.transcribe(audio, engine.sample_rate) == sentence
    assert recognizer.transcribe(audio, engine.sample_rate) == sentence  # nothing carries over


def test_digital_silence_and_no_audio_give_text_not_errors(recognizer):
    assert isinstance(recognizer.transcribe(np.zeros(16000), 16000), str)
    assert isinstance(recognizer.transcribe(np.zeros(0), 16000), str)


def test_words_that_the_dictionary_lacks_are_named():
    with pytest.raises(DataError, match="lacks 2 of the words.*frabjous, wabe"):
        PocketsphinxRecognizer(["the frabjous wabe"])


@pytest.mark.parametrize("audio", [np.zeros((2, 100)), np.array([0.0, np.nan])])
def test_audio_that_makes_no_sense_is_refused(recognizer, audio):
    with pytest.raises(DataError, match="audio to hear"):
        recognizer.transcribe(audio, 16000)


def test_a_missing_package_is_named_with_its_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    with pytest.raises(ConfigError, match=r"needs pocketsphinx.*pip install 'megatron-most\[evaluation\]'"):
        PocketsphinxRecognizer(SENTENCES)


def test_language_model_arguments_are_checked():
    with pytest.raises(ConfigError, match="order must be 1 or 2, got 3"):
        arpa_language_model([["a"]], order=3)
    with pytest.raises(DataError, match="at least one sentence"):
        arpa_language_model([], order=2)


@pytest.mark.parametrize("order", [1, 2])
def test_language_model_probabilities_sum_to_one(order):
    """After any history: the bigrams' probabilities plus the weighted unigrams of words never seen there."""
    sections = arpa_language_model([["a", "b"], ["a", "c"], ["b"]], order).split("\n\n")
    unigrams = {line.split("\t")[1]: line.split("\t") for line in sections[1].splitlines()[1:]}
    words = [word for word in unigrams if word != "<s>"]
    assert sum(10 ** float(unigrams[word][0]) for word in words) == pytest.approx(1, abs=1e-3)
    if order == 1:
        return
    bigrams = {line.split("\t")[1]: float(line.split("\t")[0]) for line in sections[2].splitlines()[1:]}
    for history in ("<s>", "a", "b", "c"):
        total = 0.0
        for word in words:
            seen = bigrams.get(f"{history} {word}")
            total += 10 ** (float(unigrams[history][2]) + float(unigrams[word][0]) if seen is None else seen)
        assert total == pytest.approx(1, abs=1e-3)
