"""Number formats: of weights and activations, and of matrix products in FP8."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_most.config.rules import require, require_not_negative, require_one_of, require_positive
from megatron_most.keys import key


@dataclass
class PrecisionConfig:
    """Weights, activations and matrix products; docs/fp8.md describes FP8.

    Routers, embeddings, heads and the attention's scores are never in FP8.
    """

    dtype: str = key("bf16", "type of weights and activations: `fp32` or `bf16`", "--bf16")
    fp8: str = key("off", "`off`, `e4m3` (everywhere) or `hybrid` (e4m3 forward, e5m2 for gradients)", "--fp8-format")
    fp8_recipe: str = key("tensorwise", "scaling: `delayed`, `tensorwise`, `blockwise` or `mxfp8`", "--fp8-recipe")
    fp8_backend: str = key(
        "auto",
        "implementation of the products: `transformer_engine`, `torch`, `emulate` (on any device, slow), or `auto`",
    )
    fp8_amax_history_len: int = key(16, "`delayed`: steps in the history of largest values", "--fp8-amax-history-len")
    num_layers_at_start_in_bf16: int = key(
        1, "number of first layers that stay in `dtype`", "--num-layers-at-start-in-bf16"
    )
    num_layers_at_end_in_bf16: int = key(1, "number of last layers that stay in `dtype`", "--num-layers-at-end-in-bf16")
    bf16_expert_pools: list[str] = key(list, "expert pools that stay in `dtype`: modalities, or `common`")

    def __post_init__(self) -> None:
        choices = {
            "dtype": ("fp32", "bf16"),
            "fp8": ("off", "e4m3", "hybrid"),
            "fp8_recipe": ("delayed", "tensorwise", "blockwise", "mxfp8"),
            "fp8_backend": ("auto", "transformer_engine", "torch", "emulate"),
        }
        for name, valid in choices.items():
            require_one_of(f"precision.{name}", getattr(self, name), valid)
        require_positive("precision", self, ("fp8_amax_history_len",))
        require_not_negative("precision", self, ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"))
        if not self.uses_fp8:
            return
        require(
            self.fp8_recipe != "mxfp8" or self.fp8 == "e4m3",
            "precision.fp8",
            self.fp8,
            "must be e4m3 with fp8_recipe=mxfp8: in its blocks of 32, e4m3 has range enough for gradients",
        )
        require(
            self.dtype == "bf16" or self.fp8_backend == "emulate",
            "precision.dtype",
            self.dtype,
            "FP8 needs bf16 weights and activations; only fp8_backend=emulate takes fp32",
        )

    @property
    def uses_fp8(self) -> bool:
        return self.fp8 != "off"

    @property
    def alignment(self) -> int:
        """The sizes of an FP8 product must be multiples of this: rows of 16 bytes, or mxfp8's blocks of 32."""
        return 32 if self.fp8_recipe == "mxfp8" else 16
