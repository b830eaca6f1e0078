"""``most``: the console program, which hands over to the command it is given."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from megatron_most import __version__

COMMANDS = {
    "doctor": "what this machine can run, what is missing and how to get it",
    "plan": "parallel layouts that fit a number of GPUs",
    "prepare": "audio and text to indexed datasets",
    "convert": "checkpoints from and to Hugging Face",
    "train": "train on this process, or under torchrun on many",
    "launch": "where the launch scripts for one node, several and SLURM are",
    "generate": "transcribe audio or speak text",
    "evaluate": "word error rates of a trained model",
    "report": "one HTML page about a run",
    "sweep": "an ablation: many runs, one table",
}
"""Command, a module of this package -> what it is for."""


def make_parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:9} {purpose}" for name, purpose in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="most",
        usage="most [-h] [--version] COMMAND ...",
        description="Pretraining of MoST, a speech-text mixture-of-experts language model.",
        epilog=f"commands (most COMMAND --help says more):\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"most {__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    given = make_parser().parse_args(arguments)
    importlib.import_module(f"megatron_most.commands.{given.command}").main(given.arguments)


if __name__ == "__main__":
    main()
