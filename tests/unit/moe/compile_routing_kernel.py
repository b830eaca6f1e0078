"""Compiles both routing kernels for a GPU that need not be there: ``python -m tests.unit.moe.compile_routing_kernel``.

Prints the registers and the memory of each kernel and configuration. Triton must not interpret here.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_most.moe import routing_kernel

TARGET = GPUTarget("cuda", 90, 32)
SIZES = {
    "NUM_EXPERTS": 64,
    "PADDED": 64,
    "NUM_MODALITIES": 2,
    "SCALE": 1.0,
    "NUM_ROWS": 1,
    "NUM_SEQUENCES": 1,
    "BLOCK": routing_kernel._ELEMENTS // 64,
}
POINTERS = {
    **dict.fromkeys(("logits", "mask", "bias", "probs", "partial"), "*fp32"),
    **dict.fromkeys(("grad_probs", "grad_prob_sums", "grad_squares", "grad_logits"), "*fp32"),
    **dict.fromkeys(("planes", "routing_map"), "*u8"),
    "top_k": "*i32",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "group": {},
    "all, renormalized, own matrices": {"SCORES_ALL": True, "NORMALIZES": True, "NUM_MATRICES": 2},
    "sigmoid, biased, 60 experts": {"IS_SIGMOID": True, "HAS_BIAS": True, "NUM_EXPERTS": 60},
    "256 experts in rows": {"NUM_EXPERTS": 256, "PADDED": 256, "BLOCK": 4, "NUM_ROWS": 2, "NUM_SEQUENCES": 2},
}
OFF = {"NORMALIZES": False, "IS_SIGMOID": False, "SCORES_ALL": False, "NUM_MATRICES": 1, "HAS_BIAS": False}


def compiled(kernel: Any, options: dict[str, Any]) -> Any:
    values = {**SIZES, **OFF, "MAX_TOP_K": 6, **options}
    names = kernel.arg_names
    constants = {(names.index(name),): value for name, value in values.items() if name in names}
    signature = {name: "constexpr" if name in values else POINTERS.get(name, "i32") for name in names}
    return triton.compile(ASTSource(kernel, signature, constants), target=TARGET)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread (``REG``), and memory in bytes; ``STACK`` and ``LOCAL`` hold what spills."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", printed)}


if __name__ == "__main__":
    for name, options in OPTIONS.items():
        for kernel in (routing_kernel._forward_kernel, routing_kernel._backward_kernel):
            used = resources(compiled(kernel, options).asm["cubin"])
            print(f"{kernel.__name__}, {name}: {used}")
            assert used["STACK"] == used["LOCAL"] == 0
