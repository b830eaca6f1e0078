"""``most``: the console program, which calls the command that it is given."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from megatron_most import __version__

COMMANDS = {
    "doctor": "report what this machine can run and what is missing",
    "plan": "list parallel layouts that fit a number of GPUs",
    "prepare": "turn audio and text into indexed datasets",
    "convert": "convert checkpoints from and to Hugging Face",
    "train": "train in this process, or under torchrun in many",
    "torchrun": "start the ranks of train or convert; if they fail, the last line is the error",
    "launch": "print the folder of the launch scripts (one node, several, SLURM, Kubernetes)",
    "generate": "transcribe audio or speak text",
    "demo": "open a web page to talk to a model",
    "evaluate": "measure a trained model: speech, spoken language, ...",
    "harness": "run text tasks of lm-evaluation-harness",
    "compare": "compare models on the same suites",
    "report": "write an HTML page about a run",
    "sweep": "run an ablation: many runs, one table",
}
"""Command, which is a module of this package -> its purpose."""


def make_parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:9} {purpose}" for name, purpose in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="most",
        usage="most [-h] [--version] COMMAND ...",
        description="Pretraining of MoST, a speech-text mixture-of-experts language model.",
        epilog=f"commands (details: most COMMAND --help):\n{listed}",
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
