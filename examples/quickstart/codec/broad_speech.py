"""Varied espeak-ng speech for codec training: many words, voices, speeds and pitches.

The quickstart voice speaks 37 words. A codec that hears nothing else learns those words as wholes, and its codes say
little about sounds; mixing in this speech keeps the codes about sounds.
"""

from __future__ import annotations

import random

VOICES = (
    "en-us", "en-us+f2", "en-us+f3", "en-us+f4", "en-us+m3", "en-us+m7", "en", "en-gb-x-rp+f4", "en-gb-scotland",
)  # fmt: skip
SPEEDS, PITCHES = (140, 155, 170, 185), (35, 45, 50, 55, 65)

SUBJECTS = (
    "the captain", "my mother", "our neighbour", "a young doctor", "the baker", "her uncle", "the whole family",
    "a stranger", "the old judge", "his sister", "every student", "the police", "a quiet boy", "the farmer's wife",
)  # fmt: skip
VERBS = (
    "opened", "watched", "carried", "repaired", "washed", "bought", "forgot", "measured", "brought", "showed us",
    "lost", "chose", "pushed", "sold", "dropped", "remembered", "enjoyed", "described",
)  # fmt: skip
ADJECTIVES = (
    "broken", "golden", "enormous", "cheap", "thin", "shiny", "ugly", "leather", "frozen", "purple", "strange",
    "valuable", "cosy", "huge", "favourite", "smooth",
)  # fmt: skip
OBJECTS = (
    "bridge", "kitchen table", "window", "mirror", "bicycle", "measure of salt", "garage", "jacket", "church bell",
    "boat", "paper box", "thumb", "vision", "judge's chair", "music book", "feather", "yellow fish", "pair of gloves",
)  # fmt: skip
ENDINGS = (
    "before breakfast", "last Thursday", "near the river", "without a word", "for seven years", "after the storm",
    "in the usual place", "with both hands", "behind the hospital", "at half past eight", "just for pleasure",
)  # fmt: skip
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
PHRASES = (
    "how much does it cost", "what time does the train leave", "I think we should go home now",
    "please turn on the light", "the weather is very nice today", "thank you for your help", "call me back tomorrow",
    "I would like a cup of coffee", "where is the nearest station", "can you hear me clearly", "water is boiling",
    "the children are playing outside", "she speaks English and French", "this is the best book I have read",
    "that is not what I said", "open the door and come in", "we usually agree about such things",
    "both of them breathe through the mouth", "the azure beach is a treasure", "choose an orange or a peach",
)  # fmt: skip


def broad_rows(count: int, seed: int) -> list[dict]:
    """``count`` utterances as rows of text, voice, speed, pitch and offset (0 samples)."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        kind = rng.random()
        if kind < 0.7:
            noun_phrase = f"{rng.choice(ADJECTIVES)} {rng.choice(OBJECTS)}"
            text = f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} the {noun_phrase} {rng.choice(ENDINGS)}"
        elif kind < 0.85:
            text = rng.choice(PHRASES)
        else:
            text = " ".join(rng.choices(NUMBERS, k=6))
        choices = {"voice": rng.choice(VOICES), "speed": rng.choice(SPEEDS), "pitch": rng.choice(PITCHES)}
        rows.append({"text": text, "offset": 0} | choices)
    return rows
