"""One training run: everything a command needs, with the rules that join its sections."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_most.config.model import VOCAB_MULTIPLE, ModelConfig
from megatron_most.config.precision import PrecisionConfig
from megatron_most.config.rules import require, require_not_negative, require_one_of, require_positive
from megatron_most.errors import ConfigError
from megatron_most.keys import REQUIRED, key
from megatron_most.vocab import VocabLayout


@dataclass
class ParallelConfig:
    """How the model is split over ranks. Data parallelism takes what is left."""

    tensor_model_parallel_size: int = key(
        1, "tensor parallelism, with sequence parallelism above 1", "--tensor-model-parallel-size"
    )
    pipeline_model_parallel_size: int = key(1, "pipeline stages", "--pipeline-model-parallel-size")
    virtual_pipeline_model_parallel_size: int | None = key(
        None, "virtual stages of each pipeline rank; null for none", "--num-virtual-stages-per-pipeline-rank"
    )
    context_parallel_size: int = key(1, "ranks that share a row's positions", "--context-parallel-size")
    expert_model_parallel_size: int = key(1, "ranks that share the experts", "--expert-model-parallel-size")
    expert_tensor_parallel_size: int | None = key(
        None, "tensor parallelism of the experts; null for that of the rest", "--expert-tensor-parallel-size"
    )

    def __post_init__(self) -> None:
        sizes = (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
        )
        require_positive("parallel", self, sizes)
        if self.expert_tensor_parallel_size is not None:
            require_positive("parallel", self, ("expert_tensor_parallel_size",))
        if self.virtual_pipeline_model_parallel_size is not None:
            require(
                self.virtual_pipeline_model_parallel_size > 1,
                "parallel.virtual_pipeline_model_parallel_size",
                self.virtual_pipeline_model_parallel_size,
                "must be at least 2, or null",
            )
            require(
                self.pipeline_model_parallel_size > 1,
                "parallel.virtual_pipeline_model_parallel_size",
                self.virtual_pipeline_model_parallel_size,
                "needs pipeline_model_parallel_size of at least 2",
            )

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the dense part of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def expert_tensor_size(self) -> int:
        """Expert tensor parallelism; Megatron's default is the tensor parallel size."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def num_stages(self) -> int:
        """Model chunks over all pipeline ranks, virtual stages included."""
        return self.pipeline_model_parallel_size * (self.virtual_pipeline_model_parallel_size or 1)

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas of the dense part; raises :class:`ConfigError` when the layout does not fit ``world_size`` ranks."""
        dense = self.model_parallel_size
        experts = self.expert_tensor_size * self.expert_model_parallel_size * self.pipeline_model_parallel_size
        for name, size in (("tensor x pipeline x context", dense), ("expert tensor x expert x pipeline", experts)):
            if size > world_size:
                raise ConfigError(f"parallel: {name} = {size} ranks, but only {world_size} were started")
            if world_size % size:
                raise ConfigError(f"parallel: {name} = {size} must divide the world size, {world_size}")
        return world_size // dense


@dataclass
class DatasetConfig:
    """One built dataset and its share of the blend."""

    path: str = key(REQUIRED, "path of the dataset, without `.json`", "--data-path")
    weight: float = key(1.0, "share of the tokens, relative to the other weights")

    def __post_init__(self) -> None:
        require(self.weight > 0, f"data: weight of {self.path}", self.weight, "must be greater than 0")


@dataclass
class DataConfig:
    """What is trained on."""

    train: list[DatasetConfig] = key(list, "training datasets and their weights", "--train-data-path")
    validation: list[DatasetConfig] = key(list, "validation datasets; weights do not count", "--valid-data-path")
    seq_length: int = key(4096, "positions of a row", "--seq-length")
    packing: bool = key(True, "fill a row with several documents")
    audio_frame_dropout: float = key(
        0.0,
        "share of the codec frames of speech to be generated that is hidden from the input, so that the model must read"
        " the text",
    )
    audio_share: float | None = key(
        None, "change the weights of `train` as little as it takes for this share of the tokens to be audio"
    )
    document_multiple: int = key(1, "pad each packed document to a multiple of this, which context parallelism needs")

    def __post_init__(self) -> None:
        require_positive("data", self, ("seq_length", "document_multiple"))
        require(
            self.seq_length % self.document_multiple == 0,
            "data.document_multiple",
            self.document_multiple,
            f"must divide data.seq_length, {self.seq_length}",
        )
        require(
            self.audio_share is None or 0 < self.audio_share < 1,
            "data.audio_share",
            self.audio_share,
            "must be between 0 and 1, or null",
        )
        require(
            0 <= self.audio_frame_dropout < 1, "data.audio_frame_dropout", self.audio_frame_dropout, "must be in [0, 1)"
        )


@dataclass
class LrScaleConfig:
    """The learning rate of one part of the model.

    Parts: ``experts.<modality>``, ``experts.common``, ``shared_experts``, ``routers``, ``dense_ffn``, ``attention``,
    ``norms``, ``embeddings`` (ids and codes, in), ``heads`` (ids and codes, out); ``rest`` is every part not named.
    """

    part: str = key(REQUIRED, "name of the part")
    scale: float = key(REQUIRED, "multiplies `optimizer.lr`; 0 freezes the part (no gradient, no optimizer state)")

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
    lr: float = key(1e-5, "highest learning rate", "--lr")
    min_lr: float = key(0.0, "lowest learning rate", "--min-lr")
    adam_beta1: float = key(0.9, "decay of the first moment", "--adam-beta1")
    adam_beta2: float = key(0.95, "decay of the second moment", "--adam-beta2")
    adam_eps: float = key(1e-8, "added to the root of the second moment", "--adam-eps")
    muon_momentum: float = key(0.95, "decay of Muon's momentum", "--muon-momentum")
    muon_nesterov: bool = key(False, "Nesterov's momentum", "--muon-nesterov")
    muon_scale_mode: str = key("spectral", "`spectral`, `shape_scaling` or `unit_rms_norm`", "--muon-scale-mode")
    muon_extra_scale_factor: float = key(1.0, "multiplies Muon's update", "--muon-extra-scale-factor")
    muon_coefficient_type: str = key(
        "quintic",
        "of the iterations: `simple`, `quintic`, `polar_express`, `cans` or `aol`",
        "--muon-coefficient-type",
    )
    muon_num_ns_steps: int = key(5, "Newton-Schulz iterations", "--muon-num-ns-steps")
    muon_fp32_matmul_prec: str = key(
        "medium", "precision of the iterations: `medium`, `high` or `highest`", "--muon-fp32-matmul-prec"
    )
    weight_decay: float = key(0.1, "weight decay", "--weight-decay")
    clip_grad: float = key(1.0, "largest norm of the gradient; 0 for no clipping", "--clip-grad")
    grad_norm_skip_threshold: float | None = key(
        None,
        "a step with a larger gradient norm leaves weights, optimizer and schedule as they were; its data counts as"
        " consumed; null skips none",
    )
    lr_warmup_iters: int = key(0, "steps until `lr` is reached", "--lr-warmup-iters")
    lr_decay_style: str = key("cosine", "down to `min_lr`: `cosine`, `linear` or `constant`", "--lr-decay-style")
    use_distributed_optimizer: bool = key(
        True, "split the optimizer's state over the ranks that hold copies", "--use-distributed-optimizer"
    )
    overlap_grad_reduce: bool = key(True, "reduce gradients while the backward pass goes on", "--overlap-grad-reduce")
    lr_scales: list[LrScaleConfig] = key(list, "learning rates of parts, and which parts are frozen")

    def __post_init__(self) -> None:
        require_positive("optimizer", self, ("lr", "adam_eps"))
        require_not_negative("optimizer", self, ("min_lr", "weight_decay", "clip_grad", "lr_warmup_iters"))
        require(self.min_lr <= self.lr, "optimizer.min_lr", self.min_lr, f"must not exceed optimizer.lr, {self.lr}")
        threshold = self.grad_norm_skip_threshold
        require(
            threshold is None or 0 < threshold < math.inf,
            "optimizer.grad_norm_skip_threshold",
            threshold,
            "must be greater than 0, or null",
        )
        require_one_of("optimizer.lr_decay_style", self.lr_decay_style, ("cosine", "linear", "constant"))
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "must be in [0, 1)")
        self._check_muon()
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
            "needs optimizer.use_distributed_optimizer=false: ranks would have slices of matrices, and Muon takes whole"
            " ones",
        )


@dataclass
class TrainingConfig:
    """The loop. Batch sizes count rows of ``data.seq_length`` positions."""

    train_iters: int = key(1000, "steps to train", "--train-iters")
    micro_batch_size: int = key(1, "rows a rank computes at once", "--micro-batch-size")
    global_batch_size: int = key(8, "rows of a step, over all ranks", "--global-batch-size")
    recompute: str = key(
        "none",
        "what the backward pass computes again, to save memory: `none`, `moe_act` (the experts' activation function),"
        " `moe` (the expert layers) or `full`",
        "--recompute-granularity, --recompute-modules",
    )
    eval_interval: int = key(0, "steps between validations; 0 for none", "--eval-interval")
    eval_iters: int = key(8, "batches of each validation dataset", "--eval-iters")
    threads_per_rank: int = key(0, "CPU threads of a rank; 0 shares the cores out")

    def __post_init__(self) -> None:
        require_positive("training", self, ("train_iters", "micro_batch_size", "global_batch_size", "eval_iters"))
        require_not_negative("training", self, ("eval_interval", "threads_per_rank"))
        require_one_of("training.recompute", self.recompute, ("none", "moe_act", "moe", "full"))


@dataclass
class CheckpointConfig:
    """Checkpoints go to ``run_dir/checkpoints``; a run that finds some there continues from the newest."""

    save_interval: int = key(1000, "steps between checkpoints; the last step is saved, too", "--save-interval")
    async_save: bool = key(
        True,
        "write while training goes on: every rank holds a copy of what it writes in host memory",
        "--async-save",
    )
    keep_last: int = key(2, "how many of the newest are kept")
    save_retain_interval: int = key(
        0, "keep those of steps divisible by this forever; 0 for none", "--save-retain-interval"
    )
    load: str | None = key(None, "checkpoint or run directory whose weights a new run starts from", "--load")

    def __post_init__(self) -> None:
        require_positive("checkpoint", self, ("save_interval", "keep_last"))
        require_not_negative("checkpoint", self, ("save_retain_interval",))
        require(
            self.save_retain_interval % self.save_interval == 0,
            "checkpoint.save_retain_interval",
            self.save_retain_interval,
            f"must be a multiple of checkpoint.save_interval, {self.save_interval}: there are no other steps to keep",
        )


@dataclass
class LoggingConfig:
    """``metrics.jsonl`` is always written."""

    log_interval: int = key(10, "steps between lines", "--log-interval")
    tensorboard: bool = key(True, "write to `run_dir/tensorboard`", "--tensorboard-dir")
    wandb_project: str | None = key(None, "Weights & Biases project; null for none", "--wandb-project")
    profile_steps: list[int] = key(
        list, "`[first, last]`: torch's profiler watches these steps on rank 0", "--profile-step-start"
    )

    def __post_init__(self) -> None:
        require_positive("logging", self, ("log_interval",))
        steps = self.profile_steps
        require(
            not steps or (len(steps) == 2 and 1 <= steps[0] <= steps[1]),
            "logging.profile_steps",
            steps,
            "must be [first, last] with 1 <= first <= last",
        )


@dataclass
class RunConfig:
    """A training run."""

    vocab: VocabLayout = key(REQUIRED, "ids and codes")
    run_dir: str = key("runs/most", "where everything is written", "--save")
    seed: int = key(1234, "of weights, data order and dropout", "--seed")
    tokenizer: str | None = key(None, "text tokenizer the data was made with; generation needs it", "--tokenizer-model")
    codec: str | None = key(None, "codec the data was made with; generation needs it")
    model: ModelConfig = key(ModelConfig, "the model")
    parallel: ParallelConfig = key(ParallelConfig, "ranks")
    data: DataConfig = key(DataConfig, "datasets and rows")
    optimizer: OptimizerConfig = key(OptimizerConfig, "optimizer and learning rate")
    precision: PrecisionConfig = key(PrecisionConfig, "number formats")
    training: TrainingConfig = key(TrainingConfig, "steps and batches")
    checkpoint: CheckpointConfig = key(CheckpointConfig, "checkpoints")
    logging: LoggingConfig = key(LoggingConfig, "logs")

    def __post_init__(self) -> None:
        model, parallel = self.model, self.parallel
        weights = model.codebook_loss_weights
        require(
            not weights or len(weights) == self.vocab.num_codebooks,
            "model.codebook_loss_weights",
            weights,
            f"needs one weight for each of the {self.vocab.num_codebooks} codebooks, or none",
        )
        require(
            [group.modality for group in model.moe.groups] == list(self.vocab.modality_names),
            "model.moe.groups",
            [group.modality for group in model.moe.groups],
            f"needs one group for each modality, in this order: {', '.join(self.vocab.modality_names)}",
        )
        require(self.seed >= 0, "seed", self.seed, "must not be negative")
        tensor = parallel.tensor_model_parallel_size
        split = {
            "model.attention.num_attention_heads": model.attention.num_attention_heads,
            "model.attention.num_query_groups": model.attention.num_query_groups
            if model.attention.type == "gqa"
            else 0,
            "model.ffn_hidden_size": model.ffn_hidden_size if model.first_k_dense_replace else 0,
            "model.moe.moe_shared_expert_intermediate_size": model.moe.moe_shared_expert_intermediate_size,
            "the multiple to which ids and codes are padded": VOCAB_MULTIPLE,
        }
        for what, size in split.items():
            require(size % tensor == 0, "parallel.tensor_model_parallel_size", tensor, f"must divide {what}, {size}")
        require(
            model.moe.moe_ffn_hidden_size % parallel.expert_tensor_size == 0,
            "parallel.expert_tensor_parallel_size",
            parallel.expert_tensor_size,
            f"must divide model.moe.moe_ffn_hidden_size, {model.moe.moe_ffn_hidden_size}",
        )
        width = model.moe.moe_ffn_hidden_size // parallel.expert_tensor_size
        multiple = 16 // {"fp32": 4, "bf16": 2}[self.precision.dtype]
        require(
            model.moe.expert_backend != "grouped" or not (model.hidden_size % multiple or width % multiple),
            "model.moe.expert_backend",
            model.moe.expert_backend,
            f"takes rows of whole 16 bytes: model.hidden_size ({model.hidden_size}) and each rank's share of"
            f" model.moe.moe_ffn_hidden_size ({width}) must be divisible by {multiple} in {self.precision.dtype};"
            " else take sequential",
        )
        require(
            self.training.recompute != "moe_act"
            or (model.moe.expert_backend != "sequential" and not self.precision.uses_fp8),
            "training.recompute",
            self.training.recompute,
            "needs model.moe.expert_backend=grouped or transformer_engine, and precision.fp8=off",
        )
        self._check_fp8()
        require(
            not model.attention.mla_down_proj_fusion or self.optimizer.optimizer == "adam",
            "model.attention.mla_down_proj_fusion",
            model.attention.mla_down_proj_fusion,
            "needs optimizer.optimizer=adam: Muon would take two matrices for one",
        )
        expert = parallel.expert_model_parallel_size
        require(
            model.moe.moe_token_dispatcher_type not in ("deepep", "hybridep")
            or expert * parallel.expert_tensor_size > 1,
            "model.moe.moe_token_dispatcher_type",
            model.moe.moe_token_dispatcher_type,
            "needs experts on several ranks: expert or expert tensor parallelism of at least 2",
        )
        require(
            model.moe.num_experts % expert == 0,
            "parallel.expert_model_parallel_size",
            expert,
            f"must divide the {model.moe.num_experts} experts",
        )
        require(
            model.num_layers % parallel.num_stages == 0,
            "parallel.pipeline_model_parallel_size",
            parallel.pipeline_model_parallel_size,
            f"pipeline x virtual stages ({parallel.num_stages}) must divide model.num_layers, {model.num_layers}",
        )
        context = parallel.context_parallel_size
        divisor = (2 * context if context > 1 else 1) * tensor
        require(
            self.data.seq_length % divisor == 0,
            "data.seq_length",
            self.data.seq_length,
            f"must be divisible by {divisor} (tensor parallel size, times twice the context parallel size above 1)",
        )
        rope = model.attention.rope
        require(
            not (context > 1 and model.attention.type == "mla" and rope.rope_type == "yarn")
            or rope.original_max_position_embeddings % (2 * context) == 0,
            "model.attention.rope.original_max_position_embeddings",
            rope.original_max_position_embeddings,
            f"must be divisible by {2 * context}, twice the context parallel size",
        )
        require(
            not (self.data.packing and context > 1) or self.data.document_multiple % (2 * context) == 0,
            "data.document_multiple",
            self.data.document_multiple,
            f"must be divisible by {2 * context}, twice the context parallel size: each rank holds a share of every"
            " packed document",
        )
        require(
            not (self.data.packing and self.training.micro_batch_size > 1),
            "training.micro_batch_size",
            self.training.micro_batch_size,
            "must be 1 with data.packing; raise data.seq_length instead",
        )
        parts = self.part_names
        for entry in self.optimizer.lr_scales:
            require_one_of("optimizer.lr_scales.part", entry.part, (*parts, "rest"))
        require(
            any(self.lr_scale(part) > 0 for part in parts),
            "optimizer.lr_scales",
            {entry.part: entry.scale for entry in self.optimizer.lr_scales},
            "freezes every part of the model: nothing is left to train",
        )
        warmup = self.optimizer.lr_warmup_iters
        require(
            warmup < self.training.train_iters,
            "optimizer.lr_warmup_iters",
            warmup,
            f"must be less than training.train_iters, {self.training.train_iters}",
        )

    def _check_fp8(self) -> None:
        """What FP8 asks of the model and its layout."""
        precision, model, parallel = self.precision, self.model, self.parallel
        if not precision.uses_fp8:
            return
        moe, tensor, multiple = model.moe, parallel.tensor_model_parallel_size, precision.alignment
        shares = {
            "model.hidden_size": (model.hidden_size, 1),
            "model.ffn_hidden_size": (model.ffn_hidden_size if model.first_k_dense_replace else 0, tensor),
            "model.moe.moe_shared_expert_intermediate_size": (moe.moe_shared_expert_intermediate_size, tensor),
            "model.moe.moe_ffn_hidden_size": (moe.moe_ffn_hidden_size, parallel.expert_tensor_size),
            **{name: (size, tensor if cut else 1) for name, (size, cut) in model.attention.projections().items()},
        }
        for name, (size, ranks) in shares.items():
            share = size // ranks
            require(
                share % multiple == 0,
                name,
                size,
                f"each rank's share, {share}, must be divisible by {multiple} for precision.fp8_recipe"
                f"={precision.fp8_recipe}",
            )
        rows = self.positions_per_rank  # which the replicated projections of latent attention see
        require(
            rows % multiple == 0,
            "data.seq_length",
            self.data.seq_length,
            f"gives {rows} positions to a rank; precision.fp8_recipe={precision.fp8_recipe} needs a multiple of"
            f" {multiple}",
        )
        pools = [group.modality for group in moe.groups if group.size] + (["common"] if moe.common.size else [])
        for pool in precision.bf16_expert_pools:
            require_one_of("precision.bf16_expert_pools", pool, pools)
        require(
            not precision.bf16_expert_pools or moe.expert_backend == "grouped",
            "precision.bf16_expert_pools",
            precision.bf16_expert_pools,
            "needs model.moe.expert_backend=grouped, which keeps the pools apart",
        )
        require(
            not model.attention.mla_down_proj_fusion or precision.fp8_recipe != "delayed",
            "model.attention.mla_down_proj_fusion",
            model.attention.mla_down_proj_fusion,
            "needs a precision.fp8_recipe without histories, not delayed: those of two products would be one",
        )
        layers = precision.num_layers_at_start_in_bf16 + precision.num_layers_at_end_in_bf16
        require(
            layers < model.num_layers,
            "precision.num_layers_at_start_in_bf16",
            precision.num_layers_at_start_in_bf16,
            f"with num_layers_at_end_in_bf16, {precision.num_layers_at_end_in_bf16}, leaves none of {model.num_layers}"
            " layers for FP8",
        )

    @property
    def part_names(self) -> tuple[str, ...]:
        """The parts of the model that ``optimizer.lr_scales`` and the gradient norms tell apart."""
        moe = self.model.moe
        experts = [f"experts.{group.modality}" for group in moe.groups if group.size]
        return (
            *experts,
            *(["experts.common"] if moe.common.size else []),
            *(["shared_experts"] if moe.moe_shared_expert_intermediate_size else []),
            "routers",
            *(["dense_ffn"] if self.model.first_k_dense_replace else []),
            "attention",
            "norms",
            "embeddings",
            "heads",
        )

    @property
    def positions_per_rank(self) -> int:
        """Positions of a micro-batch that a rank's norms and expert layers see, sequence parallelism included."""
        ranks = self.parallel.context_parallel_size * self.parallel.tensor_model_parallel_size
        return self.training.micro_batch_size * self.data.seq_length // ranks

    def lr_scale(self, part: str) -> float:
        """What the learning rate of ``part`` is multiplied by; 0 when it is frozen."""
        scales = {entry.part: entry.scale for entry in self.optimizer.lr_scales}
        return scales.get(part, scales.get("rest", 1.0))

    def uses_muon(self, part: str) -> bool:
        """Whether Muon moves the weights of ``part``: the matrices that are no tables of embeddings or outputs."""
        return self.optimizer.optimizer == "muon" and part not in ("norms", "embeddings", "heads")

    def num_microbatches(self, data_parallel_size: int) -> int:
        """Micro-batches each data-parallel rank runs per step."""
        per_pass = self.training.micro_batch_size * data_parallel_size
        require(
            self.training.global_batch_size % per_pass == 0,
            "training.global_batch_size",
            self.training.global_batch_size,
            "must be divisible by micro_batch_size x data parallel size"
            f" ({self.training.micro_batch_size} x {data_parallel_size})",
        )
        count = self.training.global_batch_size // per_pass
        if self.parallel.virtual_pipeline_model_parallel_size is not None:
            pipeline = self.parallel.pipeline_model_parallel_size
            require(
                count % pipeline == 0,
                "training.global_batch_size",
                self.training.global_batch_size,
                f"gives {count} micro-batches on each rank; virtual pipeline stages need a multiple of {pipeline}",
            )
        return count
