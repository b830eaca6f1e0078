"""Every question about hardware is asked and answered here."""

from megatron_most.platform.cpu_stand_ins import install
from megatron_most.platform.device import backend, device, has_fp8, set_threads
from megatron_most.platform.libraries import require_library

__all__ = ["backend", "device", "has_fp8", "install", "require_library", "set_threads"]
