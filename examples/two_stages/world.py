"""What is asked and what is wrong in the language of the quickstart: ``the ADJ NOUN VERB NUM ADJ NOUNS``.

A question follows its sentence, and its answer is the part of the sentence from some word on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from examples.quickstart.sentences import SLOTS, balanced_sentences

QUESTIONS = {
    "who is it": (slice(0, 3), 2),
    "what does it do": (slice(3, None), 3),
    "how many are there": (slice(4, None), 4),
}
"""Question -> the words of the sentence that answer it, and the place of the one that matters."""

CHANCE = 1 / 6
"""Of guessing the word that matters, which is one of six."""

_WORDS = """
red:rell green:greem black:blaf white:whipe little:lippel yellow:yennow fox:foz dog:dobe king:kint girl:girb
teacher:teapher farmer:farner sees:seev finds:finps follows:fonnows paints:paimps carries:cannies sells:senns
two:twee three:threel four:fourb five:fibe seven:seben nine:nipe small:smawp heavy:hebby broken:broben
golden:golben blue:bluve wooden:wooken birds:birps chairs:chaims houses:houfes letters:lekkers bottles:boggles
ships:shiks
"""
NON_WORDS = dict(pair.split(":") for pair in _WORDS.split())
"""Each word but the article, and what it becomes when a sound or two are exchanged."""

SWAPS = {"adjective_noun": 1, "verb_number": 3, "adjective_nouns": 5}
"""Rule of grammar -> the place of the first of two neighboring words whose order it decides."""


@dataclass(frozen=True)
class Exchange:
    """A question and what counts as its answer; the first is what the assistant says."""

    question: str
    answers: tuple[str, ...]


def ask(sentence: str, question: str) -> Exchange:
    """One of :data:`QUESTIONS` about a sentence."""
    where, matters = QUESTIONS[question]
    words = sentence.split()
    return Exchange(f"{sentence} {question}", (" ".join(words[where]), words[matters]))


def exchanges(sentences: Sequence[str], count: int, seed: int) -> list[Exchange]:
    """Different questions about the sentences, drawn at random; as many as there are if these are fewer."""
    pairs = [(sentence, question) for sentence in sentences for question in QUESTIONS]
    return [ask(*pair) for pair in random.Random(seed).sample(pairs, min(count, len(pairs)))]


def possible_answers() -> list[str]:
    """Answers in which all pairs of neighboring words that grammar allows occur, for a recognizer of answers."""
    return [ask(sentence, question).answers[0] for sentence in balanced_sentences(1) for question in QUESTIONS]


def swapped(sentence: str, rule: str) -> str:
    """The sentence with two words in the wrong order; ``rule`` is one of :data:`SWAPS`."""
    words, place = sentence.split(), SWAPS[rule]
    words[place : place + 2] = reversed(words[place : place + 2])
    return " ".join(words)


def wrong_last_word(sentence: str, rng: random.Random) -> str:
    """The sentence with a verb where its last word was."""
    return " ".join((*sentence.split()[:-1], rng.choice(SLOTS[2])))


def ending_of_another(sentence: str, other: str) -> str:
    """The sentence up to its verb, and then the beginning of another one."""
    return " ".join((*sentence.split()[:4], *other.split()[:3]))
