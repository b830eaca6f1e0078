"""The CPU's side of the comparisons: a program that computes one of them in fp32 and writes it to a file.

python -m tests.gpu.reference FILE NAME [ARGUMENT ...]
"""

from __future__ import annotations

import sys

GPU_ONLY = ("transformer_engine", "apex", "amp_C")
"""Megatron takes these where it finds them, and they compute on GPUs alone."""


def main(file: str, name: str, *arguments: str) -> None:
    sys.modules.update(dict.fromkeys(GPU_ONLY))  # before Megatron looks for them

    from megatron_most import platform

    assert platform.device().type == "cpu", "started with a GPU in sight"
    platform.install()

    import torch

    from megatron_most import parallel
    from tests.distributed.tiny import tiny_config
    from tests.gpu import computations

    parallel.initialize(tiny_config().parallel, seed=1)
    torch.save(computations.ON_CPU[name](*arguments), file)
    parallel.destroy()


if __name__ == "__main__":
    main(*sys.argv[1:])
