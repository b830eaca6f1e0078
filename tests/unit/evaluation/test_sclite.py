"""Word error rates against NIST's ``sclite`` (Debian: ``sctk``), which aligns words by a program of its own."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from megatron_most.evaluation.wer import word_errors

SCTK = shutil.which("sctk")
WORDS = [*"abcdefgh", "the", "fox", "dog's", "sees", "über", "42"]
pytestmark = pytest.mark.skipif(SCTK is None, reason="needs sclite: apt-get install sctk")


def pairs(count: int) -> list[tuple[str, str]]:
    """Random references, and hypotheses that lost, gained and changed words; some have nothing in common."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(count):
        reference = random.choice(WORDS, random.integers(1, 15)).tolist()
        wrong, hypothesis = random.random(), []
        for word in reference:
            kind = random.random()
            if kind < wrong / 3:
                continue
            hypothesis += [str(random.choice(WORDS)) if kind < wrong * 2 / 3 else word]
            if random.random() < wrong / 3:
                hypothesis.append(str(random.choice(WORDS)))
        found.append((" ".join(reference), " ".join(hypothesis)))
    return found


def test_the_rate_is_that_of_sclite(tmp_path: Path) -> None:
    texts = pairs(1000)
    for name, column in (("ref", 0), ("hyp", 1)):
        lines = [f"{pair[column]} (speaker-{number:04})" for number, pair in enumerate(texts)]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    report = subprocess.run(
        [SCTK, "sclite", "-r", "ref", "trn", "-h", "hyp", "trn", "-i", "spu_id", "-e", "utf-8", "-o", "pra", "stdout"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    scores = re.findall(r"Scores: \(#C #S #D #I\) (\d+) (\d+) (\d+) (\d+)", report)
    assert len(scores) == len(texts)
    errors = word_errors([pair[0] for pair in texts], [pair[1] for pair in texts], "basic")
    theirs = [sum(map(int, score[1:])) for score in scores]
    # Where an alignment may be one of several, sclite weighs a substitution 4 and the others 3 each.
    assert sum(mine.num_errors > one for mine, one in zip(errors.utterances, theirs, strict=True)) == 0
    assert errors.num_reference_words == sum(sum(map(int, score[:3])) for score in scores)
    assert errors.wer == pytest.approx(sum(theirs) / errors.num_reference_words, rel=5e-3)
