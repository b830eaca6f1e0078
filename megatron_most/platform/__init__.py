"""Every question about hardware is asked and answered here."""

from megatron_most.platform.cpu_stand_ins import install
from megatron_most.platform.device import backend, device, set_threads
from megatron_most.platform.libraries import require_library

__all__ = ["backend", "device", "install", "require_library", "set_threads"]
