"""A recognizer of the sentences that it is given: pocketsphinx.

It needs no network and no accelerator (its English acoustic model comes inside its package). It is weak on open
vocabulary, so it is given the sentences that can occur. Its error rates compare only with rates measured with the same
sentences.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from megatron_most.errors import ConfigError, DataError
from megatron_most.evaluation.normalization import normalize_text
from megatron_most.evaluation.recognizers import digest, heard
from megatron_most.extras import require

POCKETSPHINX_SAMPLE_RATE = 16000
NOISE_AMPLITUDE = 3e-4  # pocketsphinx's noise estimate fails on digital silence
SILENCE_SECONDS = 0.3  # on both sides, which that estimate also needs
SENTENCE_START, SENTENCE_END = "<s>", "</s>"


class PocketsphinxRecognizer:
    """pocketsphinx's US-English acoustic model with a closed-vocabulary n-gram language model.

    Args:
        sentences: text of the language to recognize. Its words are the vocabulary, its n-grams give the language model.
        order: 1 (unigrams) or 2 (bigrams).

    Raises:
        ConfigError: pocketsphinx is not installed, or the order is neither 1 nor 2.
        DataError: there are no sentences, or they have words that pocketsphinx's pronouncing dictionary lacks.
    """

    def __init__(self, sentences: Iterable[str], order: int = 2):
        require("pocketsphinx")
        import pocketsphinx

        words = [normalize_text(sentence).split() for sentence in sentences]
        self.name = f"pocketsphinx, {len(words)} sentences ({digest(map(' '.join, words))}), {order}-grams"
        arpa = arpa_language_model([sentence for sentence in words if sentence], order)
        full_dictionary = Path(pocketsphinx.get_model_path()) / "en-us" / "cmudict-en-us.dict"
        dictionary = pronunciations(full_dictionary, {word for sentence in words for word in sentence})
        with tempfile.TemporaryDirectory() as directory:
            language_model_path = Path(directory) / "language_model.arpa"
            dictionary_path = Path(directory) / "pronunciations.dict"
            language_model_path.write_text(arpa)
            dictionary_path.write_text(dictionary)
            self._decoder = pocketsphinx.Decoder(
                samprate=POCKETSPHINX_SAMPLE_RATE,
                loglevel="FATAL",
                lm=str(language_model_path),
                dict=str(dictionary_path),
            )

    def transcribe(self, audio: np.ndarray, sample_rate: int) -> str:
        """See :class:`~megatron_most.evaluation.recognizers.Recognizer`. The same audio gives the same words."""
        audio = heard(audio, sample_rate, POCKETSPHINX_SAMPLE_RATE)
        padded = np.pad(audio, int(SILENCE_SECONDS * POCKETSPHINX_SAMPLE_RATE))
        padded = padded + np.random.default_rng(0).normal(scale=NOISE_AMPLITUDE, size=len(padded))
        pcm = (np.clip(padded, -1, 1) * 32767).astype(np.int16)
        self._decoder.start_utt()
        self._decoder.process_raw(pcm.tobytes(), full_utt=True)
        self._decoder.end_utt()
        hypothesis = self._decoder.hyp()
        return hypothesis.hypstr if hypothesis else ""


def pronunciations(dictionary: Path, vocabulary: set[str]) -> str:
    """The lines of a CMU-style pronouncing dictionary for ``vocabulary``. Loading all its 135,000 words takes seconds.

    Raises:
        DataError: the dictionary lacks words of ``vocabulary``.
    """
    lines = []
    found = set()
    for line in dictionary.read_text(encoding="utf-8").splitlines():
        entry = line.partition(" ")[0]
        word = entry.partition("(")[0]  # other pronunciations are written word(2), word(3)
        if word in vocabulary:
            found.add(word)
            lines.append(line)
    if unknown := sorted(vocabulary - found):
        named = ", ".join(unknown[:10])
        raise DataError(f"pocketsphinx's dictionary lacks {len(unknown)} of the words to recognize: {named}")
    return "\n".join([*lines, ""])


def arpa_language_model(sentences: Sequence[Sequence[str]], order: int) -> str:
    """A language model in the ARPA text format, estimated from sentences that are split into words.

    Unigrams have add-one smoothing. Bigrams have Witten-Bell smoothing with backoff to unigrams: after a history that
    occurs n times with t different next words, those words get n / (n + t) of the probability (Witten and Bell 1991).

    Raises:
        ConfigError: the order is neither 1 nor 2.
        DataError: there are no sentences.
    """
    if order not in (1, 2):
        raise ConfigError(f"language model order must be 1 or 2, got {order}")
    if not sentences:
        raise DataError("a language model needs at least one sentence")
    unigrams: Counter[str] = Counter()
    bigrams: Counter[tuple[str, str]] = Counter()
    for words in sentences:
        tokens = [SENTENCE_START, *words, SENTENCE_END]
        unigrams.update(tokens[1:])
        bigrams.update(zip(tokens, tokens[1:], strict=False))
    total = sum(unigrams.values()) + len(unigrams)
    probability = {word: (count + 1) / total for word, count in unigrams.items()}

    followers: dict[str, list[str]] = {}
    history_counts: Counter[str] = Counter()
    for (history, word), count in bigrams.items():
        followers.setdefault(history, []).append(word)
        history_counts[history] += count

    def backoff(word: str) -> float:
        """log10 of the backoff weight: the factor of unigram probabilities for words never seen after ``word``."""
        if word not in followers:
            return 0.0
        kept = len(followers[word]) / (history_counts[word] + len(followers[word]))
        unseen = 1 - sum(probability[follower] for follower in followers[word])
        return math.log10(kept / max(unseen, 1e-6))

    lines = ["\\data\\", f"ngram 1={len(unigrams) + 1}"]
    if order == 2:
        lines.append(f"ngram 2={len(bigrams)}")
    lines += ["", "\\1-grams:"]
    for word in (SENTENCE_START, *sorted(unigrams)):
        log_probability = -99.0 if word == SENTENCE_START else math.log10(probability[word])
        lines.append(f"{log_probability:.4f}\t{word}" + (f"\t{backoff(word):.4f}" if order == 2 else ""))
    if order == 2:
        lines += ["", "\\2-grams:"]
        for (history, word), count in sorted(bigrams.items()):
            seen = count / (history_counts[history] + len(followers[history]))
            lines.append(f"{math.log10(seen):.4f}\t{history} {word}")
    return "\n".join([*lines, "", "\\end\\", ""])
