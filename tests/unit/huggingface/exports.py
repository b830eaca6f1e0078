"""Tiny random models, as native checkpoints and exported."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_most import parallel
from megatron_most.checkpointing import CheckpointMetadata, Fingerprint
from megatron_most.checkpointing.directory import STATE
from megatron_most.checkpointing.region_writer import write_checkpoint
from megatron_most.checkpointing.regions import Region, TensorForm
from megatron_most.config import ParallelConfig, RunConfig
from megatron_most.config.load import build_config
from megatron_most.conversion import export_model
from megatron_most.conversion.native import native_shapes
from megatron_most.conversion.verification import whole_model
from megatron_most.huggingface import MoSTForConditionalGeneration
from megatron_most.model import MoSTModel
from megatron_most.text import load_tokenizer, train_sentencepiece
from tests.distributed.tiny import tiny_config

GQA = {
    "model__attention__type": "gqa",
    "model__attention__num_query_groups": 2,
    "model__attention__kv_channels": 8,
}
YARN = {
    "model__attention__rope__rope_type": "yarn",
    "model__attention__rope__rotary_base": 100.0,
    "model__attention__rope__rotary_scaling_factor": 4.0,
    "model__attention__rope__original_max_position_embeddings": 16,
    "model__attention__rope__beta_fast": 3.0,
    "model__attention__rope__beta_slow": 0.5,
}
LLAMA3 = {
    **GQA,
    "model__attention__rope__rope_type": "llama3",
    "model__attention__rope__rotary_base": 100.0,
    "model__attention__rope__rotary_scaling_factor": 8.0,
    "model__attention__rope__original_max_position_embeddings": 24,
}
SIGMOID = {"model__moe__moe_router_score_function": "sigmoid"}
LIMITED = {
    "model__moe__groups": "[{modality: text, size: 6, moe_router_topk: 3, moe_router_num_groups: 3,"
    " moe_router_group_topk: 2}, {modality: audio, size: 4, moe_router_topk: 2, moe_router_num_groups: 2}]"
}
CASES: dict[str, dict[str, Any]] = {
    "frame": {},
    "frame_delay": {"vocab__layout": "frame_delay"},
    "flat": {"vocab__layout": "flat", "model__codebook_loss_weights": [1.0, 0.25]},
    "flat_delay": {"vocab__layout": "flat_delay", "vocab__num_codebooks": 3},
    "q_lora": {"model__attention__q_lora_rank": 12, **YARN},
    "gqa": GQA,
    "gqa_yarn": {**GQA, **YARN, "model__attention__rope__mscale": 1.0, "model__attention__rope__mscale_all_dim": 0.0},
    "llama3": LLAMA3,
    "three_dense": {"model__first_k_dense_replace": 3},
    "no_shared": {"model__moe__moe_shared_expert_intermediate_size": 0, "model__first_k_dense_replace": 0},
    "all": {"model__moe__score_rule": "all", "model__moe__norm_topk_prob": True},
    "sigmoid": {**SIGMOID, "model__moe__norm_topk_prob": True, "model__moe__moe_router_topk_scaling_factor": 2.5},
    "common": {
        "model__moe__groups": "[{modality: text, experts: [5, 0, 3], moe_router_topk: 3},"
        " {modality: audio, experts: [1, 2], moe_router_topk: 1}]",
        "model__moe__common": "{experts: [7, 4, 6]}",
    },
    "text_alone_has_common": {"model__moe__common": "{size: 2, modalities: [text]}"},
    "limited": LIMITED,
    "limited_sigmoid": {**LIMITED, **SIGMOID},
    "bias": {"model__moe__moe_router_bias_update_rate": 1e-3, **SIGMOID, "model__moe__norm_topk_prob": True},
    "per_modality": {"model__moe__router_weights": "per_modality"},
    "per_modality_bias": {
        "model__moe__router_weights": "per_modality",
        "model__moe__moe_router_bias_update_rate": 1e-3,
    },
    "three_modalities": {
        "vocab__further_modalities": "[{name: image, start: 20, stop: 30}]",
        "model__moe__groups": "[{modality: text, size: 4, moe_router_topk: 2}, {modality: audio, size: 4,"
        " moe_router_topk: 2}, {modality: image, size: 2, moe_router_topk: 1}]",
        "model__text_loss_weight": 3.0,
    },
    "qwen": {
        **GQA,
        "model__attention__kv_channels": 12,
        "model__attention__qk_layernorm": "head",
        "model__attention__add_qkv_bias": True,
        "model__moe__moe_shared_expert_gate": True,
        "model__share_embeddings_and_output_weights": True,
    },
    "olmoe": {**GQA, "model__attention__qk_layernorm": "all_heads"},
    "moonlight": {
        **SIGMOID,
        "model__attention__q_lora_rank": 12,
        "model__attention__latent_layernorm_epsilon": 0.1,
        "model__moe__moe_router_bias_update_rate": 1e-3,
    },
    "odd_sizes": {
        "model__moe__moe_ffn_hidden_size": 10,
        "model__hidden_size": 30,
        "model__moe__expert_backend": "sequential",
    },
}
"""Name -> overrides of the tiny configuration."""
FAST = ("frame", "flat_delay", "gqa_yarn", "common", "bias", "per_modality_bias", "qwen")
"""Cases of the fast suite: together they have each kind of attention, of ids, of experts and of router."""

SENTENCES = ["the old brown dog sees seven gray cats", "Say: Transcribe:"] * 4

_MADE = tempfile.TemporaryDirectory(prefix="most-exports-")  # deleted when the process ends


def parameters(cases: Iterable[str]) -> list[Any]:
    """``cases`` to parametrize a test with: each costs seconds, so those outside :data:`FAST` are slow."""
    return [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def config_of(case: str, **overrides: Any) -> RunConfig:
    return tiny_config(**{**CASES[case], "data__seq_length": 64, **overrides})


def write_native(config: RunConfig, out: Path, **metadata: Any) -> Path:
    """A checkpoint of random weights, large enough for every part to matter; norms near one."""
    fp32 = torch.float32
    dtype = torch.bfloat16 if config.precision.dtype == "bf16" else fp32
    forms = {
        key: TensorForm(shape, fp32 if key.endswith("expert_bias.values") else dtype)
        for key, shape in native_shapes(config).items()
    }

    def draw(region: Region) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(region.key.encode()))
        values = torch.randn(region.sizes, generator=generator) * 0.2 + ("norm" in region.key)
        return values.to(forms[region.key].dtype)

    tokenizer = None
    if config.tokenizer is not None:
        tokenizer = Fingerprint(config.tokenizer, load_tokenizer(config.tokenizer).fingerprint)
    values: dict[str, Any] = {
        "step": 7,
        "consumed_samples": 28,
        "consumed_tokens": 896,
        "config": dataclasses.asdict(config),
        "tokenizer": tokenizer,
        "codec": None,
        "world_size": 1,
        "pending": {},
        "versions": {},
        "datasets": [],
    }
    regions = [Region(key, (0,) * len(form.shape), form.shape) for key, form in forms.items()]
    parallel.initialize(ParallelConfig(), seed=0)
    try:
        made = CheckpointMetadata(**{**values, **metadata})
        write_checkpoint(out, made, forms, regions, draw, lambda directory: None)
    finally:
        parallel.destroy()
    return out


@functools.cache
def exported(case: str) -> tuple[Path, Path]:
    """The native checkpoint and the exported folder of a case, made once; the export has compared logits already."""
    folder = Path(_MADE.name) / case
    folder.mkdir()
    checkpoint = write_native(config_of(case), folder / "native")
    return checkpoint, export_model(checkpoint, folder / "hf", "hf")


def write_with_tokenizer(case: str, folder: Path, out: Path | None = None, **metadata: Any) -> Path:
    """As :func:`write_native`, with a SentencePiece model in ``folder`` that has read :data:`SENTENCES`."""
    tokenizer = train_sentencepiece(SENTENCES, folder / "tokenizer.model", 320)
    config = config_of(case, vocab__text_vocab_size=tokenizer.vocab_size + 3)
    config.tokenizer = str(folder / "tokenizer.model")
    return write_native(config, out or folder / "native", **metadata)


def exported_model(case: str) -> MoSTForConditionalGeneration:
    return MoSTForConditionalGeneration.from_pretrained(exported(case)[1], dtype=torch.float32).eval()


@contextlib.contextmanager
def native_model(case: str) -> Iterator[MoSTModel]:
    parallel.initialize(ParallelConfig(), seed=0)
    try:
        yield whole_model(config_with_length(case), exported(case)[0] / STATE).eval()
    finally:
        parallel.destroy()


def config_with_length(case: str) -> RunConfig:
    """Of a case, for one process."""
    config = config_of(case)
    sections = {name: dataclasses.asdict(getattr(config, name)) for name in ("vocab", "model", "precision")}
    return build_config(case, {**sections, "data": {"seq_length": 64}}, [])
