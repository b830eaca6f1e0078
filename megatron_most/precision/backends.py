"""The backends of FP8 products: Transformer Engine, torch's kernels, or an emulation that runs on any device."""

from __future__ import annotations

from megatron_most import platform
from megatron_most.config import RunConfig
from megatron_most.errors import ConfigError
from megatron_most.precision.product import Fp8Product
from megatron_most.precision.scaled_mm import ScaledMMProduct

_TORCH_RECIPES = ("delayed", "tensorwise")


def fp8_backend(config: RunConfig) -> str:
    """``precision.fp8_backend``, with ``auto`` resolved: Transformer Engine if the model uses its modules, else torch.

    Raises:
        ConfigError: this machine cannot compute the configured products.
    """
    precision = config.precision
    field = f"precision.fp8={precision.fp8!r}, fp8_backend={precision.fp8_backend!r}"
    is_engine = platform.model_backend(config.model.transformer_impl) == "transformer_engine"
    backend = precision.fp8_backend
    if backend == "auto":
        backend = "transformer_engine" if is_engine else "torch"
    if is_engine != (backend == "transformer_engine"):
        wanted = "transformer_engine" if backend == "transformer_engine" else "portable"
        raise ConfigError(f"{field}: needs model.transformer_impl={wanted}")
    if backend == "transformer_engine":
        _check_transformer_engine(config, field)
    if backend == "torch":
        if not platform.has_fp8():
            raise ConfigError(
                f"{field}: needs a GPU with FP8 (compute capability 8.9 or more);"
                " fp8_backend=emulate computes the same numbers on any device, slowly"
            )
        if precision.fp8_recipe not in _TORCH_RECIPES:
            raise ConfigError(
                f"{field}: torch's kernels support fp8_recipe={' and '.join(_TORCH_RECIPES)}, not"
                f" {precision.fp8_recipe!r}"
            )
    return backend


def _check_transformer_engine(config: RunConfig, field: str) -> None:
    precision, moe = config.precision, config.model.moe
    if moe.expert_backend != "transformer_engine":
        raise ConfigError(f"{field}: needs model.moe.expert_backend=transformer_engine, not {moe.expert_backend!r}")
    if precision.fp8_recipe == "delayed" and (
        precision.num_layers_at_start_in_bf16 or precision.num_layers_at_end_in_bf16
    ):
        raise ConfigError(
            f"{field}: fp8_recipe='delayed' in Transformer Engine cannot keep layers in bf16: set"
            " precision.num_layers_at_start_in_bf16 and num_layers_at_end_in_bf16 to 0, or choose another recipe"
        )


def check_fp8(config: RunConfig) -> None:
    """Raise :class:`ConfigError` if this machine cannot compute the configured FP8 products."""
    if config.precision.uses_fp8:
        fp8_backend(config)


def fp8_product(config: RunConfig, count: int = 1) -> Fp8Product:
    """The product of one linear layer, or of ``count`` experts, computed by torch's kernels or emulated."""
    return {"torch": ScaledMMProduct, "emulate": Fp8Product}[fp8_backend(config)](config.precision, count)
