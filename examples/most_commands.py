"""Run several ``most`` commands one after another in one process, which imports torch and NeMo once.

    python examples/most_commands.py "prepare tokenizer --manifest ..." "prepare tokenize ..."

Each argument is a command line without ``most``. The first command that fails ends the program with its status.
"""

from __future__ import annotations

import shlex
import sys

from megatron_most.commands import __main__ as most


def main() -> None:
    for line in sys.argv[1:]:
        arguments = shlex.split(line)
        print(f"    most {line}", flush=True)
        sys.argv = ["most", *arguments]  # what commands record of how they were called
        most.main(arguments)


if __name__ == "__main__":
    main()
