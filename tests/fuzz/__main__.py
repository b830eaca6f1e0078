"""Fuzz one reader: ``python -m tests.fuzz READER FOLDER [options of libFuzzer]``.

FOLDER takes inputs that reach new code, and those that fail. ``-max_total_time=60`` ends after a minute.
"""

import sys
from pathlib import Path

import atheris

from tests.fuzz.readers import read

CORPUS = Path(__file__).parent / "corpus"


def main() -> None:
    name, folder, *options = sys.argv[1:]
    with atheris.instrument_imports(include=["megatron_most", "yaml", "omegaconf"]):
        read(name, b"x")  # imports what the reader needs

    def try_one(data: bytes) -> None:
        read(name, data)

    arguments = ["fuzz", folder, str(CORPUS / name), f"-artifact_prefix={folder}/", "-timeout=60", "-rss_limit_mb=4096"]
    atheris.Setup([*arguments, "-max_len=4096", *options], try_one)
    atheris.Fuzz()


main()
