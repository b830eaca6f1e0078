"""The configuration of a MoST model, by the names of the Hugging Face ecosystem where it has one."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from transformers import PreTrainedConfig


class MoSTConfig(PreTrainedConfig):
    """A decoder whose experts are divided into groups, one for each modality.

    The id space is ``[text ids | begin_of_audio | end_of_audio | frame | ids of the codec layout | unused]``. Every id
    from ``begin_of_audio`` on is audio.

    Args:
        vocab_size: rows of the embedding and of the output head; the last ones are unused.
        text_vocab_size: text ids, from 0.
        num_text_ids: ids that the tokenizer can decode, at most ``text_vocab_size``; None for all text ids.
        num_codebooks, codebook_size: codes of a codec frame, and values of a code.
        codebook_vocab_size: rows of each codebook's embedding and head; the last ones are unused.
        codec_layout: ``frame``, ``frame_delay``, ``flat`` or ``flat_delay``; see ``codec_layout_most.py``.
        further_modalities: ``{name, start, stop}`` of each further modality, a range of text ids.
        attention_type: ``mla`` (multi-latent, DeepSeek-V2) or ``gqa`` (grouped-query, Llama).
        q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim: of ``mla``, by DeepSeek-V2's names.
        latent_norm_eps: of ``mla``, epsilon of the latents' norms; None for ``rms_norm_eps``.
        num_key_value_heads, head_dim: of ``gqa``.
        qkv_bias: of ``gqa``, whether the projections of queries, keys and values have biases.
        qk_norm: of ``gqa``, norms of queries and keys: ``none``, ``head`` (each by itself) or ``all_heads`` (together).
        rope_parameters: ``rope_type`` (``default``, ``yarn`` or ``llama3``), ``rope_theta``, and what the type needs.
        first_k_dense_replace: layers without experts, before all others.
        n_routed_experts: routed experts of a layer, all modalities together.
        shared_expert_intermediate_size: width of the shared experts together; 0 for none.
        shared_expert_gate: whether a learned gate multiplies the shared experts' output.
        expert_groups: for each modality, in the order of modalities: ``experts`` (those that its tokens may choose),
            ``num_experts_per_tok``, and for group-limited routing ``n_group`` and ``topk_group``.
        scoring_func: ``softmax`` or ``sigmoid``.
        score_rule: softmax over the experts a token may choose (``group``) or over all of them (``all``).
        norm_topk_prob: divide the gates of a token's experts by their sum.
        routed_scaling_factor: multiplies the gates.
        router_weights: one router matrix for all modalities (``shared``), or ``per_modality``.
        use_expert_bias: whether routers have biases that steer the choice of experts.
        text_loss_weight, codebook_loss_weights: weights of the training loss; one per codebook, 1 each when empty.
        text_only: logits of ids that are no text are -inf, for likelihoods of text among texts. An option of loading:
            ``from_pretrained(..., text_only=True)``.
        codec: ``name`` and ``fingerprint`` (SHA-256 of the weights file) of the codec that the codes are of.
        run_config: the run configuration of megatron_most that the model was trained with. ``most convert import``
            needs it; nothing else reads it.
    """

    model_type = "megatron_most"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 512
    text_vocab_size: int = 256
    num_text_ids: int | None = None
    num_codebooks: int = 4
    codebook_size: int = 64
    codebook_vocab_size: int = 128
    codec_layout: str = "frame"
    further_modalities: list[dict[str, Any]] = field(default_factory=list)
    hidden_size: int = 64
    intermediate_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    attention_type: str = "mla"
    q_lora_rank: int | None = None
    kv_lora_rank: int = 32
    qk_nope_head_dim: int = 16
    qk_rope_head_dim: int = 8
    v_head_dim: int = 16
    latent_norm_eps: float | None = None
    num_key_value_heads: int = 4
    head_dim: int = 16
    qkv_bias: bool = False
    qk_norm: str = "none"
    rope_parameters: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    first_k_dense_replace: int = 0
    n_routed_experts: int = 8
    moe_intermediate_size: int = 32
    shared_expert_intermediate_size: int = 32
    shared_expert_gate: bool = False
    expert_groups: list[dict[str, Any]] = field(
        default_factory=lambda: [
            {"modality": "text", "experts": [0, 1, 2, 3], "num_experts_per_tok": 2},
            {"modality": "audio", "experts": [4, 5, 6, 7], "num_experts_per_tok": 2},
        ]
    )
    scoring_func: str = "softmax"
    score_rule: str = "group"
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    router_weights: str = "shared"
    use_expert_bias: bool = False
    text_loss_weight: float = 1.0
    codebook_loss_weights: list[float] = field(default_factory=list)
    text_only: bool = False
    codec: dict[str, Any] | None = None
    run_config: dict[str, Any] | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @property
    def begin_of_audio_id(self) -> int:
        return self.text_vocab_size

    @property
    def end_of_audio_id(self) -> int:
        return self.text_vocab_size + 1

    @property
    def frame_id(self) -> int:
        """A codec frame; in the ``flat`` layouts, a code that is hidden from the input."""
        return self.text_vocab_size + 2

    @property
    def uses_side_codes(self) -> bool:
        """Whether codes travel beside the ids (the ``frame`` layouts), or are ids themselves (the ``flat`` ones)."""
        return self.codec_layout.startswith("frame")

    def modality_of(self, ids: Any) -> Any:
        """Index in ``expert_groups`` of each id's modality. For NumPy arrays and torch tensors alike."""
        modality = (ids >= self.text_vocab_size) * 1
        for index, entry in enumerate(self.further_modalities, start=2):
            modality = modality + ((ids >= entry["start"]) & (ids < entry["stop"])) * index
        return modality
