"""A tiny MoST model and batches for tests that compare layouts."""

from __future__ import annotations

from typing import Any

import torch

from megatron_most.config import RunConfig
from megatron_most.config.load import build_config
from megatron_most.data.loading.batch import Batch
from megatron_most.data.storage.documents import TASKS
from megatron_most.vocab import NO_CODE

SEQ_LENGTH = 32
CODEBOOK_SIZE = 16
TEXT_VOCAB = 40

WIDE: dict[str, Any] = {
    "model__hidden_size": 64,
    "model__ffn_hidden_size": 128,
    "model__moe__moe_ffn_hidden_size": 64,
    "model__moe__moe_shared_expert_intermediate_size": 64,
    "model__attention__kv_lora_rank": 64,
    "model__attention__qk_head_dim": 16,
    "model__attention__qk_pos_emb_head_dim": 32,
    "model__attention__v_head_dim": 16,
}
"""Overrides: sizes that FP8 products take."""
FP8: dict[str, Any] = {**WIDE, "precision__fp8": "hybrid", "precision__fp8_backend": "emulate"}


def tiny_config(**overrides: Any) -> RunConfig:
    """Four layers, eight experts, fp32; ``section__field=value`` overrides."""
    values = {
        "vocab": {"text_vocab_size": TEXT_VOCAB, "num_codebooks": 2, "codebook_size": CODEBOOK_SIZE},
        "model": {
            "num_layers": 4,
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "attention": {
                "num_attention_heads": 4,
                "kv_lora_rank": 16,
                "qk_head_dim": 8,
                "qk_pos_emb_head_dim": 4,
                "v_head_dim": 12,
            },
            "moe": {
                "groups": [
                    {"modality": "text", "size": 4, "moe_router_topk": 2},
                    {"modality": "audio", "size": 4, "moe_router_topk": 2},
                ],
                "moe_ffn_hidden_size": 24,
                "moe_shared_expert_intermediate_size": 32,
                "moe_aux_loss_coeff": 1e-2,
                "moe_z_loss_coeff": 1e-3,
            },
        },
        "data": {"seq_length": SEQ_LENGTH, "packing": False},
        "precision": {"dtype": "fp32"},
        "training": {"micro_batch_size": 2, "global_batch_size": 8},
    }
    dotted = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    return build_config("tiny", values, dotted)


def tiny_batch(config: RunConfig, seed: int, audio_share: float = 0.4, rows: int | None = None) -> Batch:
    """Random rows of text, audio, padding and codes: a micro-batch of them unless ``rows`` says how many.

    Ids that are not audio are spread over all text ids, those of further modalities included.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab, layout = config.vocab, config.vocab.codec_layout
    rows, length = rows or config.training.micro_batch_size, config.data.seq_length
    ids = torch.randint(0, vocab.text_vocab_size, (rows, length + 1), generator=generator)
    is_audio = torch.rand(rows, length + 1, generator=generator) < audio_share
    codes = torch.full((rows, length + 1, vocab.num_codebooks), NO_CODE)
    if layout.uses_side_codes:
        ids[is_audio] = vocab.frame
        values = torch.randint(0, vocab.codebook_size, codes.shape, generator=generator)
        codes[is_audio] = values[is_audio]
    else:
        values = torch.randint(vocab.frame + 1, vocab.size, ids.shape, generator=generator)
        ids[is_audio] = values[is_audio]
    is_padding = torch.zeros(rows, length, dtype=torch.bool)
    is_padding[0, length - 3 :] = True
    loss_mask = (torch.rand(rows, length, generator=generator) < 0.7).float() * ~is_padding
    code_labels = codes[:, 1:].clone()
    code_labels[loss_mask == 0] = NO_CODE
    multiple = config.data.document_multiple
    boundaries = [-(-boundary // multiple) * multiple for boundary in (0, 5, length // 2, length - 3, length)]
    return Batch(
        ids=ids[:, :-1].contiguous(),
        labels=ids[:, 1:].contiguous(),
        loss_mask=loss_mask,
        modality=vocab.modality_of(ids[:, :-1]),
        is_padding=is_padding,
        task=torch.randint(0, len(TASKS), (rows, length), generator=generator),
        codes=codes[:, :-1].contiguous() if layout.uses_side_codes else None,
        code_labels=code_labels if layout.uses_side_codes else None,
        cu_seqlens=torch.tensor(sorted(set(boundaries)), dtype=torch.int32) if config.data.packing else None,
    )
