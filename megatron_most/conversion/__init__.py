"""Converts checkpoints from and to Hugging Face formats, and verifies the result."""

from megatron_most.conversion.exporting import export_model
from megatron_most.conversion.import_config import ImportOptions
from megatron_most.conversion.importing import import_model
from megatron_most.conversion.inspection import describe

__all__ = ["ImportOptions", "describe", "export_model", "import_model"]
