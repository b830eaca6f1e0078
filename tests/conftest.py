"""Shared by all tests: Megatron runs on the CPU here unless there is a GPU."""

from megatron_most import platform

platform.install()
