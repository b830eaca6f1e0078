"""Readers against every input that fuzzing found, and against new ones.

The slow tests fuzz each reader for ten minutes; MOST_FUZZ_SECONDS=60 is for trying. An input that fails is printed as a
path: put it into ``corpus/READER/``, where the fast tests repeat it, and mend the reader.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.readers import READERS, read

ROOT = Path(__file__).parents[2]
CORPUS = Path(__file__).parent / "corpus"
SECONDS = int(os.environ.get("MOST_FUZZ_SECONDS", "600"))


@pytest.mark.parametrize("name", READERS)
def test_every_kept_input_is_read_or_refused_in_one_line(name):
    paths = sorted((CORPUS / name).iterdir())
    accepted = [path for path in paths if not read(name, path.read_bytes())]
    assert paths and accepted, "one input at least is what the reader is for"


@pytest.mark.parametrize("name", READERS)
def test_no_cut_and_no_flip_of_a_good_input_is_more_than_one_line(name):
    good = next(path.read_bytes() for path in sorted((CORPUS / name).iterdir()) if path.name.startswith("good"))
    step = max(1, len(good) // 40)
    for place in range(0, len(good), step):
        read(name, good[:place])
        read(name, good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 300)
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
@pytest.mark.parametrize("name", READERS)
def test_fuzzing_finds_nothing(name, tmp_path):
    command = [sys.executable, "-m", "tests.fuzz", name, str(tmp_path), f"-max_total_time={SECONDS}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stderr[-6000:]
