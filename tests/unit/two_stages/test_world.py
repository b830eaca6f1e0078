"""The toy world of two stages: questions that have one answer, mistakes that are mistakes."""

from __future__ import annotations

import itertools
import random

import pytest

from examples.quickstart.sentences import SLOTS, VOCABULARY, balanced_sentences, choice_of
from examples.two_stages import world

SENTENCE = "the red fox sees two small birds"


def is_sentence(text: str) -> bool:
    try:
        choice_of(text)
    except ValueError:
        return False
    return True


def test_an_answer_is_the_part_of_the_sentence_that_the_question_asks_for():
    assert {question: world.ask(SENTENCE, question).answers for question in world.QUESTIONS} == {
        "who is it": ("the red fox", "fox"),
        "what does it do": ("sees two small birds", "sees"),
        "how many are there": ("two small birds", "two"),
    }
    assert world.ask(SENTENCE, "who is it").question == f"{SENTENCE} who is it"


def test_conversations_are_different_and_the_same_again():
    found = world.exchanges(balanced_sentences(1), 50, seed=1)
    assert len({one.question for one in found}) == 50
    assert found == world.exchanges(balanced_sentences(1), 50, seed=1) != world.exchanges(balanced_sentences(1), 50, 2)
    assert len(world.exchanges([SENTENCE], 50, seed=1)) == len(world.QUESTIONS)


def test_a_recognizer_of_answers_knows_every_pair_of_words_that_an_answer_can_have():
    heard = {pair for text in world.possible_answers() for pair in itertools.pairwise(text.split())}
    allowed = {pair for first, second in itertools.pairwise(SLOTS) for pair in itertools.product(first, second)}
    between_parts = set(itertools.product(SLOTS[1], SLOTS[2]))  # "the red fox" ends before the verb
    assert allowed - between_parts <= heard


def test_a_non_word_is_no_word_of_the_world():
    assert set(world.NON_WORDS) == set(VOCABULARY) - {"the"}
    assert not set(world.NON_WORDS.values()) & set(VOCABULARY)
    assert len(set(world.NON_WORDS.values())) == len(world.NON_WORDS)


@pytest.mark.parametrize("rule", world.SWAPS)
def test_a_sentence_with_exchanged_words_breaks_the_grammar(rule):
    wrong = world.swapped(SENTENCE, rule)
    assert not is_sentence(wrong) and sorted(wrong.split()) == sorted(SENTENCE.split())


def test_a_wrong_ending_breaks_the_grammar():
    last = world.wrong_last_word(SENTENCE, random.Random(0))
    other = world.ending_of_another(SENTENCE, "the black king sells nine golden chairs")
    assert last.split()[:-1] == SENTENCE.split()[:-1] and not is_sentence(last)
    assert other == "the red fox sees the black king" and not is_sentence(other)
