"""Compare models on the same suites: scores, and gains over the first with paired bootstrap intervals."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_most import cli
from megatron_most.errors import ConfigError


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("compare", __doc__)
    parser.add_argument(
        "results",
        nargs="+",
        help="for each model a result of most evaluate, or a folder of them such as evaluation of a run; the first is"
        " what the others are compared with",
    )
    parser.add_argument("--output", nargs="+", default=[], help="files to write: .md, .html, or both (default: print)")
    return parser


def compare(arguments: argparse.Namespace) -> None:
    from megatron_most.evaluation import comparison
    from megatron_most.files import require_writable, write_text

    writers = {".md": comparison.markdown, ".html": comparison.page}
    for output in arguments.output:
        if Path(output).suffix not in writers:
            raise ConfigError(f"--output={output}: must end in {' or '.join(writers)}")
        require_writable(output)
    if len(arguments.results) < 2:
        raise ConfigError("compare: needs the results of at least two models")
    table = comparison.compare(arguments.results)
    for output in arguments.output:
        write_text(output, writers[Path(output).suffix](*table))
    if not arguments.output:
        print(comparison.markdown(*table), end="")


def main(arguments: Sequence[str] | None = None) -> None:
    cli.run(make_parser(), compare, arguments)


if __name__ == "__main__":
    main()
