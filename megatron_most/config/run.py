"""One training run: everything a command needs, with the rules that join its sections."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_most.config.data import DataConfig
from megatron_most.config.model import VOCAB_MULTIPLE, ModelConfig
from megatron_most.config.optimizer import OptimizerConfig
from megatron_most.config.parallel import ParallelConfig
from megatron_most.config.precision import PrecisionConfig
from megatron_most.config.rules import require, require_one_of
from megatron_most.config.training import CheckpointConfig, LoggingConfig, TrainingConfig
from megatron_most.keys import REQUIRED, key
from megatron_most.vocab import VocabLayout

_BYTES = {"fp32": 4, "bf16": 2}
_GROUPED_ALIGNMENT = 16
"""torch's grouped product takes rows of a multiple of this many bytes."""


@dataclass
class RunConfig:
    """A training run."""

    vocab: VocabLayout = key(REQUIRED, "ids and codes")
    run_dir: str = key("runs/most", "directory of everything that the run writes", "--save")
    seed: int = key(1234, "seed of initial weights, data order and dropout", "--seed")
    tokenizer: str | None = key(
        None, "text tokenizer that the data was built with; generation needs it", "--tokenizer-model"
    )
    codec: str | None = key(None, "codec that the data was built with; generation needs it")
    model: ModelConfig = key(ModelConfig, "the model")
    parallel: ParallelConfig = key(ParallelConfig, "parallel layout")
    data: DataConfig = key(DataConfig, "datasets and rows")
    optimizer: OptimizerConfig = key(OptimizerConfig, "optimizer and learning rate")
    precision: PrecisionConfig = key(PrecisionConfig, "number formats")
    training: TrainingConfig = key(TrainingConfig, "steps and batches")
    checkpoint: CheckpointConfig = key(CheckpointConfig, "checkpoints")
    logging: LoggingConfig = key(LoggingConfig, "logs")

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "must not be negative")
        self._check_vocabulary()
        self._check_tensor_parallelism()
        self._check_experts()
        self._check_fp8()
        self._check_pipeline()
        self._check_rows()
        self._check_optimizer()
        require(
            self.training.retention.data is None or self.tokenizer is not None,
            "training.retention.data",
            self.training.retention.data,
            "needs tokenizer, which turns the text into ids",
        )

    def _check_vocabulary(self) -> None:
        """The model has a loss weight for each codebook, or none, and an expert group for each modality."""
        weights = self.model.codebook_loss_weights
        require(
            not weights or len(weights) == self.vocab.num_codebooks,
            "model.codebook_loss_weights",
            weights,
            f"needs one weight for each of the {self.vocab.num_codebooks} codebooks, or none",
        )
        names = [group.modality for group in self.model.moe.groups]
        require(
            names == list(self.vocab.modality_names),
            "model.moe.groups",
            names,
            f"needs one group for each modality, in this order: {', '.join(self.vocab.modality_names)}",
        )

    def _check_tensor_parallelism(self) -> None:
        """Tensor parallelism cuts every matrix into equal shares."""
        model, tensor = self.model, self.parallel.tensor_model_parallel_size
        attention = model.attention
        split = {
            "model.attention.num_attention_heads": attention.num_attention_heads,
            "model.attention.num_query_groups": attention.num_query_groups if attention.type == "gqa" else 0,
            "model.ffn_hidden_size": model.ffn_hidden_size if model.first_k_dense_replace else 0,
            "model.moe.moe_shared_expert_intermediate_size": model.moe.moe_shared_expert_intermediate_size,
            "the multiple to which ids and codes are padded": VOCAB_MULTIPLE,
        }
        for what, size in split.items():
            require(size % tensor == 0, "parallel.tensor_model_parallel_size", tensor, f"must divide {what}, {size}")

    def _check_experts(self) -> None:
        """Expert parallelism cuts the experts into equal shares that their implementation and dispatcher can use."""
        model, moe, parallel = self.model, self.model.moe, self.parallel
        expert, expert_tensor = parallel.expert_model_parallel_size, parallel.expert_tensor_size
        require(
            moe.num_experts % expert == 0,
            "parallel.expert_model_parallel_size",
            expert,
            f"must divide the {moe.num_experts} experts",
        )
        require(
            moe.moe_ffn_hidden_size % expert_tensor == 0,
            "parallel.expert_tensor_parallel_size",
            expert_tensor,
            f"must divide model.moe.moe_ffn_hidden_size, {moe.moe_ffn_hidden_size}",
        )
        width = moe.moe_ffn_hidden_size // expert_tensor
        multiple = _GROUPED_ALIGNMENT // _BYTES[self.precision.dtype]
        require(
            moe.expert_backend != "grouped" or not (model.hidden_size % multiple or width % multiple),
            "model.moe.expert_backend",
            moe.expert_backend,
            f"needs rows of a multiple of {_GROUPED_ALIGNMENT} bytes: model.hidden_size ({model.hidden_size}) and each"
            f" rank's share of model.moe.moe_ffn_hidden_size ({width}) must be divisible by {multiple} in"
            f" {self.precision.dtype}; or use sequential",
        )
        require(
            moe.moe_token_dispatcher_type not in ("deepep", "hybridep") or expert * expert_tensor > 1,
            "model.moe.moe_token_dispatcher_type",
            moe.moe_token_dispatcher_type,
            "needs experts on several ranks: expert or expert tensor parallelism of at least 2",
        )
        require(
            self.training.recompute != "moe_act"
            or (moe.expert_backend != "sequential" and not self.precision.uses_fp8),
            "training.recompute",
            self.training.recompute,
            "needs model.moe.expert_backend=grouped or transformer_engine, and precision.fp8=off",
        )

    def _check_fp8(self) -> None:
        """FP8 products have the sizes that the recipe needs, and something to compute."""
        precision, model, moe = self.precision, self.model, self.model.moe
        if not precision.uses_fp8:
            return
        self._check_fp8_sizes()
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
            "needs a precision.fp8_recipe other than delayed, which keeps an amax history for each projection",
        )
        layers = precision.num_layers_at_start_in_bf16 + precision.num_layers_at_end_in_bf16
        require(
            layers < model.num_layers,
            "precision.num_layers_at_start_in_bf16",
            precision.num_layers_at_start_in_bf16,
            f"with num_layers_at_end_in_bf16, {precision.num_layers_at_end_in_bf16}, leaves none of {model.num_layers}"
            " layers for FP8",
        )

    def _check_fp8_sizes(self) -> None:
        precision, model, moe = self.precision, self.model, self.model.moe
        tensor, multiple = self.parallel.tensor_model_parallel_size, precision.alignment
        shares = {
            "model.hidden_size": (model.hidden_size, 1),
            "model.ffn_hidden_size": (model.ffn_hidden_size if model.first_k_dense_replace else 0, tensor),
            "model.moe.moe_shared_expert_intermediate_size": (moe.moe_shared_expert_intermediate_size, tensor),
            "model.moe.moe_ffn_hidden_size": (moe.moe_ffn_hidden_size, self.parallel.expert_tensor_size),
            **{name: (size, tensor if cut else 1) for name, (size, cut) in model.attention.projections().items()},
        }
        for name, (size, ranks) in shares.items():
            require(
                size // ranks % multiple == 0,
                name,
                size,
                f"each rank's share, {size // ranks}, must be divisible by {multiple} for precision.fp8_recipe"
                f"={precision.fp8_recipe}",
            )
        rows = self.positions_per_rank  # of the projections of latent attention that every tensor-parallel rank holds
        require(
            rows % multiple == 0,
            "data.seq_length",
            self.data.seq_length,
            f"gives {rows} positions to a rank; precision.fp8_recipe={precision.fp8_recipe} needs a multiple of"
            f" {multiple}",
        )

    def _check_pipeline(self) -> None:
        """Every pipeline stage has as many layers."""
        stages = self.parallel.num_stages
        require(
            self.model.num_layers % stages == 0,
            "parallel.pipeline_model_parallel_size",
            self.parallel.pipeline_model_parallel_size,
            f"pipeline x virtual stages ({stages}) must divide model.num_layers, {self.model.num_layers}",
        )

    def _check_rows(self) -> None:
        """Context and sequence parallelism cut rows into equal shares; packing has one row per micro-batch."""
        data, attention, rope = self.data, self.model.attention, self.model.attention.rope
        context = self.parallel.context_parallel_size
        divisor = (2 * context if context > 1 else 1) * self.parallel.tensor_model_parallel_size
        require(
            data.seq_length % divisor == 0,
            "data.seq_length",
            data.seq_length,
            f"must be divisible by {divisor} (tensor parallel size, times twice the context parallel size above 1)",
        )
        require(
            not (context > 1 and attention.type == "mla" and rope.rope_type == "yarn")
            or rope.original_max_position_embeddings % (2 * context) == 0,
            "model.attention.rope.original_max_position_embeddings",
            rope.original_max_position_embeddings,
            f"must be divisible by {2 * context}, twice the context parallel size",
        )
        require(
            not (data.packing and context > 1) or data.document_multiple % (2 * context) == 0,
            "data.document_multiple",
            data.document_multiple,
            f"must be divisible by {2 * context}, twice the context parallel size: each rank holds a share of every"
            " packed document",
        )
        require(
            not (data.packing and self.training.micro_batch_size > 1),
            "training.micro_batch_size",
            self.training.micro_batch_size,
            "must be 1 with data.packing; raise data.seq_length instead",
        )

    def _check_optimizer(self) -> None:
        """Muon gets whole matrices, learning-rate scales name parts of this model, and warmup ends before training."""
        optimizer, fused = self.optimizer, self.model.attention.mla_down_proj_fusion
        require(
            not fused or optimizer.optimizer == "adam",
            "model.attention.mla_down_proj_fusion",
            fused,
            "needs optimizer.optimizer=adam: Muon would treat the two fused matrices as one",
        )
        for entry in optimizer.lr_scales:
            require_one_of("optimizer.lr_scales.part", entry.part, (*self.part_names, "rest"))
        require(
            any(self.lr_scale(part) > 0 for part in self.part_names),
            "optimizer.lr_scales",
            {entry.part: entry.scale for entry in optimizer.lr_scales},
            "freezes every part of the model: nothing is left to train",
        )
        require(
            optimizer.lr_warmup_iters < self.training.train_iters,
            "optimizer.lr_warmup_iters",
            optimizer.lr_warmup_iters,
            f"must be less than training.train_iters, {self.training.train_iters}",
        )

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of the parts of the model, for ``optimizer.lr_scales`` and the gradient norms."""
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
            "embeddings.audio",
            *self._head_parts,
        )

    @property
    def _head_parts(self) -> tuple[str, ...]:
        """Output heads that have weights of their own: not that of ids where it is the embedding."""
        if not self.model.share_embeddings_and_output_weights:
            return "heads", "heads.audio"
        return ("heads.audio",) if self.vocab.codec_layout.uses_side_codes else ()

    @property
    def positions_per_rank(self) -> int:
        """Positions of a micro-batch in a rank's norms and expert layers, after context and sequence parallelism."""
        ranks = self.parallel.context_parallel_size * self.parallel.tensor_model_parallel_size
        return self.training.micro_batch_size * self.data.seq_length // ranks

    def lr_scale(self, part: str) -> float:
        """The factor on the learning rate of ``part``; 0 if it is frozen. ``heads.audio`` follows ``heads``."""
        scales = {entry.part: entry.scale for entry in self.optimizer.lr_scales}
        return scales.get(part, scales.get(part.removesuffix(".audio"), scales.get("rest", 1.0)))

    def uses_muon(self, part: str) -> bool:
        """Whether Muon updates the weights of ``part``: all matrices but those of embeddings and output heads."""
        return self.optimizer.optimizer == "muon" and not part.startswith(("norms", "embeddings", "heads"))

    def num_microbatches(self, data_parallel_size: int) -> int:
        """Micro-batches per step on each data-parallel rank; :class:`ConfigError` if they do not come out even."""
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
