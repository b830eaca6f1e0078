"""The optimizer, its learning-rate schedule, and the learning rates of parts of the model."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_most.config.rules import require, require_not_negative, require_one_of, require_positive
from megatron_most.keys import REQUIRED, key


@dataclass
class LrScaleConfig:
    """The learning rate of a part of the model.

    Parts are ``experts.<modality>``, ``experts.common``, ``shared_experts``, ``routers``, ``dense_ffn``, ``attention``,
    ``norms``, ``embeddings``, ``embeddings.audio``, ``heads`` and ``heads.audio``. ``rest`` stands for every part not
    named. The parts in ``.audio`` are the rows of audio ids and all codebooks; where they are not named, they follow
    the part before the dot.
    """

    part: str = key(REQUIRED, "name of the part")
    scale: float = key(REQUIRED, "factor on `optimizer.lr`; 0 freezes the part (no gradient, no optimizer state)")

    def __post_init__(self) -> None:
        require(self.scale >= 0, f"optimizer.lr_scales[{self.part}].scale", self.scale, "must not be negative")


@dataclass
class OptimizerConfig:
    """The optimizer and its learning-rate schedule.

    Muon (arXiv 2502.16982) updates matrices; AdamW updates embeddings, heads and norms. Muon's update of a matrix
    ``[out, in]`` is its momentum, made orthogonal by Newton-Schulz iterations and multiplied by
    ``muon_extra_scale_factor`` and, by ``muon_scale_mode``, the root of max(out, in) (``spectral``), of
    max(1, out / in) (``shape_scaling``) or of out / in (``unit_rms_norm``).
    """

    optimizer: str = key("adam", "`adam` (AdamW) or `muon`", "--optimizer")
    lr: float = key(1e-5, "maximum learning rate", "--lr")
    min_lr: float = key(0.0, "minimum learning rate", "--min-lr")
    adam_beta1: float = key(0.9, "AdamW: decay of the first moment", "--adam-beta1")
    adam_beta2: float = key(0.95, "AdamW: decay of the second moment", "--adam-beta2")
    adam_eps: float = key(1e-8, "AdamW: epsilon, added to the root of the second moment", "--adam-eps")
    muon_momentum: float = key(0.95, "Muon: decay of the momentum", "--muon-momentum")
    muon_nesterov: bool = key(False, "Muon: Nesterov momentum", "--muon-nesterov")
    muon_scale_mode: str = key(
        "spectral",
        "Muon: scale of an update, by the shape of its matrix: `spectral`, `shape_scaling` or `unit_rms_norm`",
        "--muon-scale-mode",
    )
    muon_extra_scale_factor: float = key(1.0, "Muon: factor on every update", "--muon-extra-scale-factor")
    muon_coefficient_type: str = key(
        "quintic",
        "Muon: Newton-Schulz coefficients: `simple`, `quintic`, `polar_express`, `cans` or `aol`",
        "--muon-coefficient-type",
    )
    muon_num_ns_steps: int = key(5, "Muon: number of Newton-Schulz iterations", "--muon-num-ns-steps", most=100)
    muon_fp32_matmul_prec: str = key(
        "medium",
        "Muon: torch's fp32 matmul precision in the iterations: `medium`, `high` or `highest`",
        "--muon-fp32-matmul-prec",
    )
    weight_decay: float = key(0.1, "weight decay", "--weight-decay")
    clip_grad: float = key(1.0, "maximum norm of the gradient; 0 for no clipping", "--clip-grad")
    grad_norm_skip_threshold: float | None = key(
        None,
        "skip the update of a step with a larger gradient norm: weights, optimizer and schedule stay as they were, its"
        " data counts as consumed; null never skips",
    )
    lr_warmup_iters: int = key(0, "warmup steps up to `lr`", "--lr-warmup-iters")
    lr_decay_style: str = key(
        "cosine", "decay from `lr` to `min_lr`: `cosine`, `linear`, or `constant` for none", "--lr-decay-style"
    )
    use_distributed_optimizer: bool = key(
        True, "shard the optimizer state over data-parallel ranks", "--use-distributed-optimizer"
    )
    overlap_grad_reduce: bool = key(
        True, "overlap the reduction of gradients with the backward pass", "--overlap-grad-reduce"
    )
    overlap_param_gather: bool = key(
        False,
        "gather the updated weights during the next forward pass instead of after the update",
        "--overlap-param-gather",
    )
    lr_scales: list[LrScaleConfig] = key(list, "learning rates of parts of the model; 0 freezes a part")

    def __post_init__(self) -> None:
        require_positive("optimizer", self, ("lr", "adam_eps"))
        require_not_negative("optimizer", self, ("min_lr", "weight_decay", "clip_grad", "lr_warmup_iters"))
        require(self.min_lr <= self.lr, "optimizer.min_lr", self.min_lr, f"must not exceed optimizer.lr, {self.lr}")
        threshold = self.grad_norm_skip_threshold
        require(
            threshold is None or threshold > 0,
            "optimizer.grad_norm_skip_threshold",
            threshold,
            "must be greater than 0, or null",
        )
        require_one_of("optimizer.lr_decay_style", self.lr_decay_style, ("cosine", "linear", "constant"))
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "must be in [0, 1)")
        self._check_muon()
        require(
            not self.overlap_param_gather or (self.use_distributed_optimizer and self.overlap_grad_reduce),
            "optimizer.overlap_param_gather",
            self.overlap_param_gather,
            "needs optimizer.use_distributed_optimizer=true, which has weights gathered, and"
            " optimizer.overlap_grad_reduce=true, which divides them into buckets",
        )
        parts = [entry.part for entry in self.lr_scales]
        require(len(set(parts)) == len(parts), "optimizer.lr_scales", parts, "names a part twice")

    def _check_muon(self) -> None:
        require_one_of("optimizer.optimizer", self.optimizer, ("adam", "muon"))
        choices = {
            "muon_scale_mode": ("spectral", "shape_scaling", "unit_rms_norm"),
            "muon_coefficient_type": ("simple", "quintic", "polar_express", "cans", "aol"),
            "muon_fp32_matmul_prec": ("medium", "high", "highest"),
        }
        for name, valid in choices.items():
            require_one_of(f"optimizer.{name}", getattr(self, name), valid)
        require(0 <= self.muon_momentum < 1, "optimizer.muon_momentum", self.muon_momentum, "must be in [0, 1)")
        require_positive("optimizer", self, ("muon_extra_scale_factor", "muon_num_ns_steps"))
        require(
            self.optimizer == "adam" or not self.use_distributed_optimizer,
            "optimizer.optimizer",
            self.optimizer,
            "needs optimizer.use_distributed_optimizer=false: Muon updates whole matrices, and ranks would hold slices",
        )
