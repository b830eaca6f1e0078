"""Who executes FP8 products: Transformer Engine, torch's kernels, or an emulation that runs anywhere."""

from __future__ import annotations

from megatron_most import platform
from megatron_most.config import PrecisionConfig, RunConfig
from megatron_most.errors import ConfigError
from megatron_most.precision.product import Fp8Product
from megatron_most.precision.scaled_mm import ScaledMMProduct

_TORCH_RECIPES = ("delayed", "tensorwise")


def fp8_backend(precision: PrecisionConfig) -> str:
    """``precision.fp8_backend``, with ``auto`` decided: torch's kernels where the GPU has FP8.

    Raises:
        ConfigError: this machine cannot execute the configured products.
    """
    backend = "torch" if precision.fp8_backend == "auto" else precision.fp8_backend
    if backend == "torch":
        field = f"precision.fp8={precision.fp8!r}, fp8_backend={precision.fp8_backend!r}"
        if not platform.has_fp8():
            raise ConfigError(
                f"{field}: needs a GPU with FP8 (compute capability 8.9 or more);"
                " fp8_backend=emulate computes the same numbers anywhere, slowly"
            )
        if precision.fp8_recipe not in _TORCH_RECIPES:
            raise ConfigError(
                f"{field}: torch's kernels take the recipes {' and '.join(_TORCH_RECIPES)}, not"
                f" {precision.fp8_recipe!r}"
            )
    return backend


def check_fp8(config: RunConfig) -> None:
    """Raise :class:`ConfigError` unless this machine can compute what the configuration asks for in FP8."""
    if config.precision.uses_fp8:
        fp8_backend(config.precision)


def fp8_product(precision: PrecisionConfig, count: int = 1) -> Fp8Product:
    """The product of a linear layer, or of ``count`` experts, by the configured backend."""
    return {"torch": ScaledMMProduct, "emulate": Fp8Product}[fp8_backend(precision)](precision, count)
