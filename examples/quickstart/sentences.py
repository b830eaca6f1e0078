"""The template language of the quickstart corpus, and which of its sentences are held out.

Every sentence is ``the ADJ NOUN VERB NUM ADJ NOUNS`` with six words per slot: 46,656 sentences. Three neighboring
slot pairs (adjective-noun, verb-number, adjective-noun) are *guarded*: a sixth of their word pairs, those with word
indices i and j where ``(i + j) % 6 == 0``, never occurs in training. This gives two held-out sets:

* ``heldout_s`` (seen pairs): sentences that are not in training, made of word pairs that are. Measures reading.
* ``heldout_p`` (unseen pairs): neither adjective-noun pair occurs in training. Measures composition: a model that
  memorized pairs instead of words fails.

Run as a script, it rewrites the corpus, ``corpus/*.jsonl``.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

CORPUS_DIR = Path(__file__).parent / "corpus"
SPLIT_SIZES = {"train": 4000, "heldout_s": 200, "heldout_p": 200}
SEED = 20250

SLOTS = (
    ("red", "green", "black", "white", "little", "yellow"),
    ("fox", "dog", "king", "girl", "teacher", "farmer"),
    ("sees", "finds", "follows", "paints", "carries", "sells"),
    ("two", "three", "four", "five", "seven", "nine"),
    ("small", "heavy", "broken", "golden", "blue", "wooden"),
    ("birds", "chairs", "houses", "letters", "bottles", "ships"),
)
GUARDED_SLOT_PAIRS = ((0, 1), (2, 3), (4, 5))
VOCABULARY = ("the", *(word for slot in SLOTS for word in slot))

SPEEDS = (160, 170, 180, 190)  # words per minute
PITCHES = (40, 45, 50, 55, 60)  # espeak-ng's scale, 50 is the voice's own
MAX_OFFSET = 640  # samples of silence before the speech: 40 ms, one codec frame, so codes cannot be learned by position

Choice = tuple[int, ...]  # one word index per slot


def text_of(choice: Choice) -> str:
    """The sentence of one word index per slot."""
    return " ".join(("the", *(slot[index] for slot, index in zip(SLOTS, choice, strict=True))))


def choice_of(text: str) -> Choice:
    """The word indices of a sentence; raises ValueError if it does not follow the template."""
    article, *words = text.split()
    if article != "the" or len(words) != len(SLOTS):
        raise ValueError(f"not a sentence of the template: {text!r}")
    return tuple(slot.index(word) for slot, word in zip(SLOTS, words, strict=True))


def held_out_pairs(choice: Choice) -> tuple[bool, ...]:
    """For each guarded slot pair, whether this sentence's word pair is held out from training."""
    return tuple((choice[first] + choice[second]) % 6 == 0 for first, second in GUARDED_SLOT_PAIRS)


def draw_splits() -> dict[str, list[Choice]]:
    """The three splits, each in random order; no sentence is in two of them."""
    rng = random.Random(SEED)
    drawn: set[Choice] = set()
    splits: dict[str, list[Choice]] = {}
    for name, size in SPLIT_SIZES.items():
        splits[name] = []
        while len(splits[name]) < size:
            choice = tuple(rng.randrange(len(slot)) for slot in SLOTS)
            adjective_noun, verb_number, adjective_nouns = held_out_pairs(choice)
            if name == "heldout_p":
                wanted = adjective_noun and adjective_nouns
            else:
                wanted = not (adjective_noun or verb_number or adjective_nouns)
            if wanted and choice not in drawn:
                drawn.add(choice)
                splits[name].append(choice)
    return splits


def balanced_sentences(repeats: int = 100) -> list[str]:
    """Sentences in which all pairs of neighboring words are equally frequent, held-out pairs included.

    A recognizer's language model trained on them prefers no split.
    """
    choices = [(first, second) * (len(SLOTS) // 2) for first in range(6) for second in range(6)]
    return [text_of(choice) for choice in choices] * repeats


def main() -> None:
    rng = random.Random(SEED + 1)
    CORPUS_DIR.mkdir(exist_ok=True)
    for name, choices in draw_splits().items():
        with open(CORPUS_DIR / f"{name}.jsonl", "w") as file:
            for index, choice in enumerate(choices):
                row = {
                    "id": f"{name}-{index:04d}",
                    "text": text_of(choice),
                    "speed": rng.choice(SPEEDS),
                    "pitch": rng.choice(PITCHES),
                    "offset": rng.randrange(MAX_OFFSET),
                }
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
