"""Install the packages of a list that this Python lacks. Installed packages stay, whatever their version.

    python tools/install_missing.py docker/requirements-training.txt [LIST ...] [option of pip install ...]

For containers and clusters whose torch, Transformer Engine and Apex are compiled for each other. Runs pip for the
missing packages only, without dependencies, in the versions of constraints.txt. Afterwards, tools/doctor.py --check
tells whether the installed packages are new enough. Needs only Python and pip.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib import metadata
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lists", nargs="+", type=Path, metavar="LIST", help="file with one name per line")
    words = sys.argv[1:]
    first_option = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    if {"-h", "--help"} & set(words):
        first_option = len(words)
    arguments, options = parser.parse_args(words[:first_option]), words[first_option:]
    names: dict[str, None] = {}
    for path in arguments.lists:
        try:
            lines = path.read_text().splitlines()
        except OSError as error:
            parser.error(f"{path}: {error.strerror}")
        names |= dict.fromkeys(name for line in lines if (name := line.partition("#")[0].strip()))
    missing = [name for name in names if not is_installed(name)]
    print(f"{len(names) - len(missing)} of {len(names)} packages are installed and stay; installing {len(missing)}")
    if not missing:
        return 0
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-c", str(CONSTRAINTS)]
    return subprocess.run([*command, *options, *missing]).returncode


def is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
