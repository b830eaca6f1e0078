"""Print the folder of the launch scripts. The head of each script describes its use and its settings.

"$(most launch)/single_node.sh" --config FILE.yaml [key=value ...]
PET_NNODES=8 PET_RDZV_ENDPOINT=node1:29400 "$(most launch)/multi_node.sh" --config FILE.yaml    # on every node
sbatch --partition P "$(most launch)/pretrain.sbatch" --config FILE.yaml
cp "$(most launch)/pytorchjob.yaml" .                                        # Kubernetes: a manifest to fill in
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_most import cli

LAUNCHERS = Path(__file__).parent / "launchers"


def make_parser() -> argparse.ArgumentParser:
    return cli.make_parser("launch", __doc__)


def launch(arguments: argparse.Namespace) -> None:
    print(LAUNCHERS)


def main(arguments: Sequence[str] | None = None) -> None:
    cli.run(make_parser(), launch, arguments)


if __name__ == "__main__":
    main()
