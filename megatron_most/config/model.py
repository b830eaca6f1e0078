"""The model: DeepSeek-V2's shape at any size, with expert groups per modality."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_most.config.attention import AttentionConfig
from megatron_most.config.moe import MoEConfig
from megatron_most.config.rules import require, require_one_of, require_positive
from megatron_most.keys import key
from megatron_most.vocab import VocabLayout

VOCAB_MULTIPLE = 128
"""Ids and codes are padded to this multiple at every tensor-parallel size, so that checkpoints fit all layouts."""


@dataclass
class ModelConfig:
    """A MoST model without its vocabulary. The defaults are DeepSeek-V2-Lite's dimensions.

    The training loss of a target is the main head's cross entropy; that of a codec frame adds its codebooks' losses.
    """

    transformer_impl: str = key(
        "auto",
        "implementation of attention, norms and linear layers: `transformer_engine`, `portable` (torch alone), or"
        " `auto`: Transformer Engine if it is installed and there is a GPU. Weights are the same",
        "--transformer-impl",
        training_only=True,
    )
    num_layers: int = key(27, "transformer layers", "--num-layers", most=10_000)
    hidden_size: int = key(2048, "width of the hidden states", "--hidden-size", most=1 << 20)
    ffn_hidden_size: int = key(10944, "inner width of the dense layers", "--ffn-hidden-size", most=1 << 24)
    first_k_dense_replace: int = key(
        1,
        "number of first layers that are dense; all others have experts (Hugging Face's name; Megatron takes a list)",
        "--moe-layer-freq",
    )
    share_embeddings_and_output_weights: bool = key(
        False,
        "one matrix is both the embedding of ids and their output head; codebooks have their own",
        "--untie-embeddings-and-output-weights",
    )
    layernorm_epsilon: float = key(1e-6, "epsilon of the RMS norms", "--norm-epsilon")
    init_method_std: float = key(0.02, "standard deviation of initial weights", "--init-method-std", training_only=True)
    codebook_loss_weights: list[float] = key(
        list,
        "loss weight of each codebook; 1 each when empty. Where codes are ids (`flat`), it weights the id's loss",
        training_only=True,
    )
    text_loss_weight: float = key(
        1.0,
        "factor on the loss of text targets: a transcript has far fewer targets than its speech",
        training_only=True,
    )
    attention: AttentionConfig = key(AttentionConfig, "attention")
    moe: MoEConfig = key(MoEConfig, "experts and router")

    def __post_init__(self) -> None:
        positive = ("num_layers", "hidden_size", "ffn_hidden_size", "layernorm_epsilon", "init_method_std")
        require_positive("model", self, (*positive, "text_loss_weight"))
        require_one_of("model.transformer_impl", self.transformer_impl, ("auto", "portable", "transformer_engine"))
        require(
            0 <= self.first_k_dense_replace < self.num_layers,
            "model.first_k_dense_replace",
            self.first_k_dense_replace,
            f"must leave at least one of the {self.num_layers} layers for experts",
        )
        for weight in self.codebook_loss_weights:
            require(weight >= 0, "model.codebook_loss_weights", self.codebook_loss_weights, "must not be negative")

    def codebook_weights(self, vocab: VocabLayout) -> list[float]:
        """One loss weight per codebook; 1.0 each unless set."""
        return self.codebook_loss_weights or [1.0] * vocab.num_codebooks
