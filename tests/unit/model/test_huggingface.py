"""The model computes what Hugging Face's DeepSeek-V2 and Llama compute, with the same random weights, in fp32."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_most import parallel
from megatron_most.config import RunConfig
from megatron_most.config.load import build_config
from megatron_most.model import MoSTModel, build_model
from megatron_most.model.packed_row import packed_row
from megatron_most.moe import ExpertGroups
from tests.distributed.shards import local_pieces

VOCAB, HIDDEN, FFN, EXPERT_FFN, HEADS = 50, 32, 48, 24, 4
LENGTHS = (40, 3, 17)  # documents; the longest goes beyond the original length of every rescaled rope
TOLERANCE = 2e-5  # of logits of about 1

ROPE = {"rope_type": "rope", "rotary_base": 100.0}
YARN = {
    "rope_type": "yarn",
    "rotary_base": 100.0,
    "rotary_scaling_factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 3.0,
    "beta_slow": 0.5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rotary_base": 100.0,
    "rotary_scaling_factor": 8.0,
    "original_max_position_embeddings": 24,
}
HF_YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 3.0,
    "beta_slow": 0.5,
}
HF_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "original_max_position_embeddings": 24,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


@pytest.fixture(scope="module", autouse=True)
def process_groups():
    parallel.initialize(run_config({"type": "mla"}, {}).parallel, seed=1)
    yield
    parallel.destroy()


def run_config(attention: dict, moe: dict) -> RunConfig:
    model = {
        "num_layers": 3,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": FFN,
        "attention": {"num_attention_heads": HEADS, **attention},
        "moe": {"moe_ffn_hidden_size": EXPERT_FFN, **moe},
    }
    return build_config(
        "test",
        {
            "vocab": {"text_vocab_size": VOCAB, "num_codebooks": 2, "codebook_size": 8, "layout": "flat"},
            "model": model,
            "data": {"seq_length": 64},
            "precision": {"dtype": "fp32"},
        },
    )


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough for every part to matter; norms differ from one."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2 + ("norm" in name))
    return model.eval()


def loaded(config: RunConfig, weights: dict[str, torch.Tensor]) -> MoSTModel:
    """Our model with ``weights``, by their names in checkpoints; ids beyond the text ids keep what they have."""
    [model] = build_model(config)
    used = set()
    with torch.no_grad():
        for key, _, offset, view in local_pieces([model]):
            used.add(key)
            if "word_embeddings" in key or "output_layer" in key:
                view[:VOCAB].copy_(weights[key])
            else:
                region = tuple(slice(at, at + size) for at, size in zip(offset, view.shape, strict=True))
                view.copy_(weights[key][region])
    assert used == weights.keys()
    return model.eval()


def shared_weights(hf: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What both families have: embeddings, norms, output projections, dense layers."""
    weights = {
        "embedding.word_embeddings.weight": hf.model.embed_tokens.weight,
        "decoder.final_layernorm.weight": hf.model.norm.weight,
        "output_layer.weight": hf.lm_head.weight,
    }
    for i, layer in enumerate(hf.model.layers):
        prefix = f"decoder.layers.{i}"
        weights[f"{prefix}.input_layernorm.weight"] = layer.input_layernorm.weight
        weights[f"{prefix}.pre_mlp_layernorm.weight"] = layer.post_attention_layernorm.weight
        weights[f"{prefix}.self_attention.linear_proj.weight"] = layer.self_attn.o_proj.weight
    weights["decoder.layers.0.mlp.linear_fc1.weight"] = gate_and_up(hf.model.layers[0].mlp)
    weights["decoder.layers.0.mlp.linear_fc2.weight"] = hf.model.layers[0].mlp.down_proj.weight
    return weights


def gate_and_up(mlp: torch.nn.Module) -> torch.Tensor:
    return torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])


def assert_same_logits(hf: torch.nn.Module, model: MoSTModel) -> None:
    """Each document alone, and all of them packed into one row."""
    generator = torch.Generator().manual_seed(3)
    documents = [torch.randint(0, VOCAB, (1, length), generator=generator) for length in LENGTHS]
    with torch.no_grad():
        expected = [hf(document).logits for document in documents]
        alone = [our_logits(model, document) for document in documents]
        packed = our_logits(model, torch.cat(documents, dim=1), LENGTHS)
    assert expected[0].std() > 0.3
    torch.testing.assert_close(alone[0], expected[0], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(packed, torch.cat(expected, dim=1), rtol=0, atol=TOLERANCE)


def our_logits(model: MoSTModel, ids: torch.Tensor, lengths: tuple[int, ...] | None = None) -> torch.Tensor:
    packed = None
    if lengths is not None:
        packed = packed_row(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32))
    is_padding = torch.zeros_like(ids, dtype=torch.bool)
    logits, _ = model(ids, model.vocab.modality_of(ids), is_padding, packed_seq_params=packed)
    return logits[..., :VOCAB]


# DeepSeek-V2. Text chooses among three experts of its own and three common ones; audio's are filled at random.

DEEPSEEK_MOE = {
    "groups": [
        {"modality": "text", "size": 3, "moe_router_topk": 2},
        {"modality": "audio", "size": 2, "moe_router_topk": 1},
    ],
    "common": {"size": 3},
    "moe_shared_expert_intermediate_size": 2 * EXPERT_FFN,
    "moe_router_topk_scaling_factor": 1.5,
}
DEEPSEEK_DIMS = {"kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 16, "v_head_dim": 12}


def deepseek(q_lora_rank: int | None, rope_parameters: dict) -> DeepseekV2ForCausalLM:
    config = DeepseekV2Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        moe_intermediate_size=EXPERT_FFN,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        q_lora_rank=q_lora_rank,
        first_k_dense_replace=1,
        n_routed_experts=6,
        n_shared_experts=2,
        num_experts_per_tok=2,
        routed_scaling_factor=1.5,
        max_position_embeddings=128,
        rope_parameters=rope_parameters,
        attn_implementation="eager",
        kv_lora_rank=DEEPSEEK_DIMS["kv_lora_rank"],
        qk_nope_head_dim=DEEPSEEK_DIMS["qk_head_dim"],
        qk_rope_head_dim=DEEPSEEK_DIMS["qk_pos_emb_head_dim"],
        v_head_dim=DEEPSEEK_DIMS["v_head_dim"],
    )
    return randomized(DeepseekV2ForCausalLM(config))


def deepseek_weights(hf: DeepseekV2ForCausalLM, config: RunConfig) -> dict[str, torch.Tensor]:
    weights = shared_weights(hf)
    groups = ExpertGroups.from_config(config.model.moe)
    for i, layer in enumerate(hf.model.layers):
        prefix, attention = f"decoder.layers.{i}.self_attention", layer.self_attn
        if attention.q_lora_rank is None:
            weights[f"{prefix}.linear_q_proj.weight"] = attention.q_proj.weight
        else:
            weights[f"{prefix}.linear_q_down_proj.weight"] = attention.q_a_proj.weight
            weights[f"{prefix}.q_layernorm.weight"] = attention.q_a_layernorm.weight
            weights[f"{prefix}.linear_q_up_proj.weight"] = attention.q_b_proj.weight
        weights[f"{prefix}.linear_kv_down_proj.weight"] = attention.kv_a_proj_with_mqa.weight
        weights[f"{prefix}.kv_layernorm.weight"] = attention.kv_a_layernorm.weight
        weights[f"{prefix}.linear_kv_up_proj.weight"] = attention.kv_b_proj.weight
    for i, layer in enumerate(hf.model.layers[1:], start=1):
        prefix = f"decoder.layers.{i}.mlp"
        theirs = {
            "router.weight": layer.mlp.gate.weight,
            "experts.experts.linear_fc1.weight": layer.mlp.experts.gate_up_proj,
            "experts.experts.linear_fc2.weight": layer.mlp.experts.down_proj,
        }
        for name, weight in theirs.items():
            ours = torch.randn(groups.num_experts, *weight.shape[1:], generator=torch.Generator().manual_seed(i))
            ours[list(groups.choices[0])] = weight.detach()
            weights[f"{prefix}.{name}"] = ours
        weights[f"{prefix}.shared_experts.linear_fc1.weight"] = gate_and_up(layer.mlp.shared_experts)
        weights[f"{prefix}.shared_experts.linear_fc2.weight"] = layer.mlp.shared_experts.down_proj.weight
    return weights


@pytest.mark.parametrize("q_lora_rank", [None, 20])
@pytest.mark.parametrize(
    ("rope", "hf_rope"),
    [
        (ROPE, {"rope_type": "default", "rope_theta": 100.0}),
        (
            {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
            {**HF_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        ),
        ({**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}, {**HF_YARN, "mscale": 1.0, "mscale_all_dim": 0.5}),
    ],
    ids=["rope", "yarn", "yarn-unequal-mscale"],
)
def test_deepseek_v2(q_lora_rank, rope, hf_rope):
    config = run_config({"type": "mla", **DEEPSEEK_DIMS, "q_lora_rank": q_lora_rank, "rope": rope}, DEEPSEEK_MOE)
    hf = deepseek(q_lora_rank, hf_rope)
    assert_same_logits(hf, loaded(config, deepseek_weights(hf, config)))


# Llama. Its dense layers become layers of equal experts whose weights sum to one.

UPCYCLED_MOE = {
    "groups": [
        {"modality": "text", "size": 2, "moe_router_topk": 2},
        {"modality": "audio", "size": 2, "moe_router_topk": 1},
    ],
    "moe_ffn_hidden_size": FFN,
    "moe_shared_expert_intermediate_size": 0,
    "norm_topk_prob": True,
}
HEAD_DIM, KEY_VALUE_HEADS = 16, 2


def llama(rope_parameters: dict) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=128,
        rope_parameters=rope_parameters,
        attn_implementation="eager",
    )
    return randomized(LlamaForCausalLM(config))


def llama_weights(hf: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    weights = shared_weights(hf)
    for i, layer in enumerate(hf.model.layers):
        attention = layer.self_attn
        parts = [
            projection.weight.view(KEY_VALUE_HEADS, -1, HIDDEN)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        weights[f"decoder.layers.{i}.self_attention.linear_qkv.weight"] = torch.cat(parts, dim=1).flatten(0, 1)
    for i, layer in enumerate(hf.model.layers[1:], start=1):
        prefix = f"decoder.layers.{i}.mlp"
        weights[f"{prefix}.router.weight"] = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(i))
        weights[f"{prefix}.experts.experts.linear_fc1.weight"] = gate_and_up(layer.mlp).expand(4, -1, -1)
        weights[f"{prefix}.experts.experts.linear_fc2.weight"] = layer.mlp.down_proj.weight.expand(4, -1, -1)
    return weights


@pytest.mark.parametrize(
    ("rope", "hf_rope"),
    [
        (ROPE, {"rope_type": "default", "rope_theta": 100.0}),
        ({**YARN, "mscale": 1.0, "mscale_all_dim": 0.0}, HF_YARN),
        ({**YARN, "mscale": 0.9, "mscale_all_dim": 0.3}, {**HF_YARN, "mscale": 0.9, "mscale_all_dim": 0.3}),
        (LLAMA3, HF_LLAMA3),
        ({**LLAMA3, "rotary_scaling_factor": 2.0}, {**HF_LLAMA3, "factor": 2.0}),
    ],
    ids=["rope", "yarn", "yarn-mscale", "llama3", "llama3-factor-2"],
)
def test_llama(rope, hf_rope):
    attention = {"type": "gqa", "num_query_groups": KEY_VALUE_HEADS, "kv_channels": HEAD_DIM, "rope": rope}
    hf = llama(hf_rope)
    assert_same_logits(hf, loaded(run_config(attention, UPCYCLED_MOE), llama_weights(hf)))
