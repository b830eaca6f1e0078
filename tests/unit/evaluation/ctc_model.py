"""A tiny random recognizer in the form of facebook/hubert-large-ls960-ft."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import (
    HubertConfig,
    HubertForCTC,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)

SYMBOLS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFG"]


def write_ctc_model(folder: Path) -> None:
    """Weights, configuration and processor."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({symbol: place for place, symbol in enumerate(SYMBOLS)}))
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions = {"conv_dim": [8, 8], "conv_stride": [10, 8], "conv_kernel": [10, 8]}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    config = HubertConfig(
        vocab_size=len(SYMBOLS),
        num_feat_extract_layers=2,
        feat_extract_norm="layer",
        **sizes,
        **convolutions,
        **positions,
    )
    HubertForCTC(config).save_pretrained(folder)
