"""FP8 matrix products: how tensors are quantized, and which backend multiplies them."""

from megatron_most.precision.backends import check_fp8, fp8_backend, fp8_product
from megatron_most.precision.linear import as_fp8_linear
from megatron_most.precision.product import Fp8Product

__all__ = ["Fp8Product", "as_fp8_linear", "check_fp8", "fp8_backend", "fp8_product"]
