"""Evaluation sets in the toy world, in the layouts of the published ones.

    python examples/two_stages/make_sets.py --corpus runs/two_stages/corpus --output runs/two_stages/sets

| folder | made like | right, and wrong |
|---|---|---|
| ``sLM21-dataset/lexical`` | sWUGGY | a word of the corpus; one with other sounds |
| ``sLM21-dataset/syntactic`` | sBLIMP | a sentence; one with two words in the wrong order |
| ``sSC`` | spoken StoryCloze | a sentence; one that ends in a verb |
| ``tSC`` | topic StoryCloze | a sentence; one that goes on as another begins |
| ``salmon_benchmark`` | SALMon | one voice in one room; a change of voice, mood, noise or room |
| ``eval_datas/web_questions`` | OpenAudioBench | questions about sentences; ``answers.jsonl`` has all answers |
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.quickstart.espeak import Espeak  # noqa: E402
from examples.quickstart.make_corpus import SAMPLE_RATE, render  # noqa: E402
from examples.two_stages import data_sets, world  # noqa: E402
from examples.two_stages.synthesizer import manner, write_wav  # noqa: E402
from megatron_most import cli  # noqa: E402
from megatron_most.data.preparation.manifest import read_manifest  # noqa: E402
from megatron_most.files import write_text  # noqa: E402

SEED = 11
VOICES = {"A": {"speed": 165, "pitch": 45}, "B": {"speed": 185, "pitch": 55}}
EXCITED = {"speed": 240, "pitch": 95}
NOISE = 0.05
"""Standard deviation; speech peaks at 0.7."""


class Sets:
    """Speaks the sets. The same sentences give the same files."""

    def __init__(self, heldout: list[str], train: list[str], count: int) -> None:
        self.engine = Espeak()
        self.sentences, self.count = heldout[:count], count
        self.words = Counter(word for text in train for word in text.split())
        self.heldout = heldout

    def say(self, text: str, key: str, **fixed: Any) -> np.ndarray:
        return render(self.engine, {"text": text, **manner(key, **fixed)})

    def lexical(self) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        for number, (word, other) in enumerate(list(world.NON_WORDS.items())[: self.count]):
            for voice, fixed in VOICES.items():
                for correct, text in ((1, word), (0, other)):
                    row = {"filename": _name("l", number, voice, correct), "id": number, "voice": voice}
                    row |= {"frequency": self.words[word] if correct else "", "word": text}
                    row |= {"phones": " ".join(text.upper()), "length": len(text), "correct": correct}
                    yield row, self.say(text, word, **fixed)

    def syntactic(self) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        rules = list(world.SWAPS)
        for number, sentence in enumerate(self.sentences):
            rule = rules[number % len(rules)]
            for voice, fixed in VOICES.items():
                for correct, text in ((1, sentence), (0, world.swapped(sentence, rule))):
                    row = {"filename": _name("s", number, voice, correct), "id": number, "voice": voice}
                    row |= {"type": "word_order", "subtype": rule, "transcription": text, "correct": correct}
                    yield row, self.say(text, sentence, **fixed)

    def stories(self, kind: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        rng = random.Random(SEED)
        for number, sentence in enumerate(self.sentences):
            other = self.heldout[(number + 1) % len(self.heldout)]
            wrong = world.wrong_last_word(sentence, rng) if kind == "sSC" else world.ending_of_another(sentence, other)
            yield self.say(sentence, sentence), self.say(wrong, sentence)

    def salmon(self) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
        changes = {
            "bg_alignment": lambda one, two, key: (_hiss(one, key), _hiss(two, key)),
            "bg_all_consistency": lambda one, two, key: (one, _hiss(two, key)),
            "bg_domain_consistency": lambda one, two, key: (_hum(one), _hiss(two, key)),
            "rir_consistency": lambda one, two, key: (one, _room(two)),
        }
        voices: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
            "gender_consistency": ({}, {"voice": "en-us+f4"}),  # f2 and f3 sound otherwise in each process
            "sentiment_alignment": (EXCITED, EXCITED),
            "sentiment_consistency": ({}, EXCITED),
            "speaker_consistency": ({}, {"voice": "en-gb-scotland"}),
        }
        found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in (*changes, *voices)}
        for sentence in self.sentences[: max(2, self.count // 5)]:
            halves = " ".join(sentence.split()[:4]), " ".join(sentence.split()[4:])
            one, two = (self.say(half, sentence, offset=0) for half in halves)
            for name, change in changes.items():
                plain = (_hum(one), _hum(two)) if name == "bg_domain_consistency" else (one, two)
                found[name].append((np.concatenate(plain), np.concatenate(change(one, two, sentence))))
            for name, fixed in voices.items():
                parts = [self.say(half, sentence, offset=0, **how) for half, how in zip(halves, fixed, strict=True)]
                found[name].append((np.concatenate([one, two]), np.concatenate(parts)))
        return found

    def questions(self) -> Iterator[data_sets.Spoken]:
        for one in world.exchanges(self.heldout, self.count, SEED):
            yield data_sets.Spoken(one.question, self.say(one.question, one.question), one.answers)


def _name(task: str, number: int, voice: str, correct: int) -> str:
    """The name of a file, which tells nobody what is in it."""
    return f"{random.Random(f'{task}{number}{voice}{correct}').getrandbits(64):016x}"


def _hiss(waveform: np.ndarray, key: str) -> np.ndarray:
    noise = np.random.default_rng(len(key) + len(waveform)).normal(0, NOISE, len(waveform))
    return (waveform + noise).astype(np.float32)


def _hum(waveform: np.ndarray) -> np.ndarray:
    time = np.arange(len(waveform)) / SAMPLE_RATE
    return (waveform + NOISE * np.sin(2 * np.pi * 120 * time)).astype(np.float32)


def _room(waveform: np.ndarray) -> np.ndarray:
    """The recording in a bare room: echoes that fade within 0.3 s."""
    length = int(0.3 * SAMPLE_RATE)
    echo = np.random.default_rng(SEED).normal(0, 0.03, length) * np.exp(-6 * np.arange(length) / length)
    echo[0] = 1
    heard = np.convolve(waveform, echo)[: len(waveform)]
    return (0.7 * heard / np.abs(heard).max()).astype(np.float32)


def make_sets(arguments: argparse.Namespace) -> None:
    cli.require_positive(arguments, "count")
    manifests = [arguments.corpus / f"{name}.jsonl" for name in ("heldout_s", "train")]
    texts = [[one.text for one in read_manifest(path, needs_audio=False)] for path in manifests]
    sets, output = Sets(*texts, arguments.count), arguments.output
    for task, rows in (("lexical", sets.lexical()), ("syntactic", sets.syntactic())):
        data_sets.zerospeech(output / "sLM21-dataset", task, "dev", rows, write_wav)
    for kind in ("sSC", "tSC"):
        data_sets.numbered_stories(output / kind, sets.stories(kind), write_wav)
    data_sets.salmon(output / "salmon_benchmark", sets.salmon(), write_wav)
    data_sets.open_audio_bench(output, "web_questions", sets.questions(), write_wav)
    lines = [json.dumps({"text": text}) + "\n" for text in world.possible_answers()]
    write_text(output / "answers.jsonl", "".join(lines))
    print(f"{output}: {len(list(output.rglob('*.wav')))} recordings")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="make evaluation sets in the toy world")
    parser.add_argument("--corpus", type=Path, required=True, help="what make_corpus.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--count", type=int, default=36, help="samples of each set, about (default %(default)s)")
    cli.run(parser, make_sets)
