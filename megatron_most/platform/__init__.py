"""Every question about hardware is asked and answered here."""

from megatron_most.platform.cpu_stand_ins import install
from megatron_most.platform.device import backend, device, set_threads

__all__ = ["backend", "device", "install", "set_threads"]
