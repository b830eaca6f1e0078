"""Everything that depends on the hardware: devices, kernels, and stand-ins on machines without a GPU."""

from megatron_most.platform.attention import document_attention, wants_equal_head_sizes, why_no_document_attention
from megatron_most.platform.choices import model_backend, part_choices
from megatron_most.platform.cpu_stand_ins import install
from megatron_most.platform.device import (
    backend,
    device,
    driver_version,
    has_fp8,
    has_grouped_fp8,
    peak_memory,
    set_threads,
)
from megatron_most.platform.libraries import has_library, require_library
from megatron_most.platform.trial import can_run_triton, compare_seconds

__all__ = [
    "backend",
    "can_run_triton",
    "compare_seconds",
    "device",
    "document_attention",
    "driver_version",
    "has_fp8",
    "has_grouped_fp8",
    "has_library",
    "install",
    "model_backend",
    "part_choices",
    "peak_memory",
    "require_library",
    "set_threads",
    "wants_equal_head_sizes",
    "why_no_document_attention",
]
