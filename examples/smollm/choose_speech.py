"""Those sentences of the studio that are made of its most frequent words: manifests with the same audio.

python examples/smollm/choose_speech.py --studio runs/studio --words 200 --output runs/smollm/speech
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megatron_most.cli import require_positive, run  # noqa: E402
from megatron_most.errors import DataError  # noqa: E402
from megatron_most.files import read_text, write_text  # noqa: E402

SETS = ("train", "heldout_sentences", "heldout_pairs")


def main(arguments: argparse.Namespace) -> None:
    require_positive(arguments, "words")
    words = set(read_text(arguments.studio / "text" / "vocabulary.txt", DataError).split()[: arguments.words])
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in SETS:
        lines = read_text(arguments.studio / "speech" / f"{name}.jsonl", DataError).splitlines()
        kept = [line for line in lines if words.issuperset(json.loads(line)["text"].split())]
        if not kept:
            raise DataError(f"--words={arguments.words}: no sentence of {name} is made of these words alone; use more")
        write_text(arguments.output / f"{name}.jsonl", "".join(f"{line}\n" for line in kept))
        hours = sum(json.loads(line)["duration"] for line in kept) / 3600
        print(f"{name}: {len(kept)} sentences, {hours:.2f} hours")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="choose sentences of frequent words from the studio's speech")
    parser.add_argument("--studio", type=Path, required=True, help="run directory of examples/studio")
    parser.add_argument("--words", type=int, default=200, help="the most frequent ones (default %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the manifests")
    run(parser, main)
