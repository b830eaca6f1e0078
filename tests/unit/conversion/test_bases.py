"""Every base: imported and exported it computes what transformers does; what its format cannot hold is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_most.checkpointing.directory import STATE
from megatron_most.checkpointing.regions import StateReader
from megatron_most.commands.convert import FORMATS
from megatron_most.conversion import ImportOptions, export_model, import_model
from megatron_most.conversion.architecture import ForeignModel
from megatron_most.conversion.architectures import BY_NAME, read_foreign
from megatron_most.conversion.import_plan import plan_import
from megatron_most.errors import CheckpointError, ConfigError
from megatron_most.huggingface import MoSTForConditionalGeneration
from tests.distributed.tiny import tiny_config
from tests.unit.conversion.models import BASES, VOCAB, fresh_copy, write_base
from tests.unit.conversion.test_round_trips import (
    assert_same_files,
    assert_same_logits,
    native_logits,
    options,
    tokens,
)

FAST = ("qwen3-moe", "moonlight", "smollm2")


def mode_of(name: str) -> str:
    return BY_NAME[BASES[name][0]].modes[-1]


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in BASES]
)
def test_a_base_computes_what_transformers_does_and_comes_back(tmp_path, name):
    model = write_base(name, tmp_path / "hf")
    checkpoint = import_model(tmp_path / "hf", tmp_path / "native", options(mode_of(name)))
    assert_same_logits(native_logits(checkpoint, tokens())[..., :VOCAB], model, tokens())
    # As a model of its own format.
    export_model(checkpoint, tmp_path / "back", BASES[name][0])
    assert_same_files(tmp_path / "hf", tmp_path / "back")
    assert_same_logits(fresh_copy(tmp_path / "back")(tokens()).logits, model, tokens())
    # As a MoST model in plain PyTorch, and back from there.
    most = MoSTForConditionalGeneration.from_pretrained(
        export_model(checkpoint, tmp_path / "most", "hf"), dtype=torch.float32
    ).eval()
    with torch.no_grad():
        assert_same_logits(most(tokens()).logits[..., :VOCAB], model, tokens())
    again = import_model(tmp_path / "most", tmp_path / "again", ImportOptions())
    first, second = (StateReader(path / STATE) for path in (checkpoint, again))
    assert first.forms == second.forms
    assert all(torch.equal(first.read_whole(key), second.read_whole(key)) for key in first.forms)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moonlight", "mixtral"])
def test_a_partition_is_undone_bit_for_bit(tmp_path, name):
    write_base(name, tmp_path / "hf", torch.bfloat16)
    checkpoint = import_model(tmp_path / "hf", tmp_path / "native", options("partition"))
    export_model(checkpoint, tmp_path / "back", BASES[name][0], experts="all")
    mine, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("hf", "back"))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor.float(), theirs[key].float()) for key, tensor in mine.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    # What the text model has no place for, biases of audio's experts too, is beside it.
    export_model(checkpoint, tmp_path / "text", BASES[name][0])
    again = import_model(tmp_path / "text", tmp_path / "again", ImportOptions())
    first, second = (StateReader(path / STATE) for path in (checkpoint, again))
    assert first.forms == second.forms
    assert all(torch.equal(first.read_whole(key), second.read_whole(key)) for key in first.forms)


def test_each_modality_starts_with_the_biases_of_its_experts(tmp_path):
    model = write_base("moonlight", tmp_path / "hf")
    plan = plan_import(tmp_path / "hf", options("expand", noise=0.1))
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    key = "decoder.layers.1.mlp.router.expert_bias.values"
    rows = torch.zeros(2, 16)
    for region in plan.regions:
        if region.key == key:
            (row, start), (_, count) = region.offsets, region.sizes
            rows[row, start : start + count] = plan.produce(region).flatten()
    assert torch.equal(rows, torch.stack([torch.cat([bias, 0 * bias]), torch.cat([0 * bias, bias])]))


def test_layers_that_predict_further_tokens_are_left_aside(tmp_path):
    write_base("moonlight", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    name = "model.layers.2.eh_proj.weight"
    save_file({**tensors, name: torch.zeros(2, 2)}, tmp_path / "hf" / "model.safetensors")
    plan = plan_import(tmp_path / "hf", options("expand"))
    assert plan.unused == {name: "predicts further tokens, which is not converted"}


def test_a_tied_base_may_be_given_a_head_of_its_own(tmp_path):
    write_base("smollm2", tmp_path / "hf")
    tied = plan_import(tmp_path / "hf", options("upcycle"))
    assert tied.config.model.share_embeddings_and_output_weights and "output_layer.weight" not in tied.forms
    wanted = options("upcycle", "model.share_embeddings_and_output_weights=false")
    assert "output_layer.weight" in plan_import(tmp_path / "hf", wanted).forms


@pytest.mark.parametrize("name, override, match", [
    ("qwen2", "model.share_embeddings_and_output_weights=true", "share_embeddings_and_output_weights=True: .* False"),
    ("qwen2", "model.attention.add_qkv_bias=false", "add_qkv_bias=False: .* has True"),
    ("qwen3", "model.attention.qk_layernorm=all_heads", "qk_layernorm='all_heads': .* has 'head'"),
    ("qwen3", "model.moe.moe_shared_expert_gate=true", "moe_shared_expert_gate=True: .* has False"),
    ("moonlight", "model.moe.moe_router_bias_update_rate=0", "must be above 0: .* has expert biases"),
    ("moonlight", "model.attention.latent_layernorm_epsilon=0.01", "latent_layernorm_epsilon=.*: .* has 1e-06"),
])  # fmt: skip
def test_wishes_that_do_not_fit_the_base(tmp_path, name, override, match):
    write_base(name, tmp_path / "hf")
    with pytest.raises(ConfigError, match=match):
        plan_import(tmp_path / "hf", options(mode_of(name), override))


PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen3-moe": {
        "model_type": "qwen3_moe", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "moe_intermediate_size": 8,
        "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "sliding_window": None, "use_sliding_window": False, "max_window_layers": 48,
        "rope_scaling": None, "rope_theta": 1000000.0, "attention_bias": False, "hidden_act": "silu",
    },
    "olmoe": {
        "model_type": "olmoe", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2,
        "clip_qkv": None, "norm_topk_prob": False, "attention_bias": False,
    },
    "mixtral": {
        "model_type": "mixtral", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2,
        "sliding_window": None, "router_jitter_noise": 0.0, "rms_norm_eps": 1e-05,
    },
    "qwen2": {
        "model_type": "qwen2", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "use_sliding_window": False, "sliding_window": 32768,
        "max_window_layers": 21, "layer_types": ["full_attention", "full_attention"],
    },
}  # fmt: skip
"""Fields that ``config.json`` of published models has, with small sizes."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_fields_of_published_models_are_known(name):
    architecture, foreign = read_foreign(PUBLISHED[name], "config.json")
    assert architecture.name == name and foreign.model["num_layers"] == 2


def test_absent_fields_mean_what_transformers_takes():
    _, foreign = read_foreign(PUBLISHED["olmoe"], "config.json")
    assert (foreign.model["layernorm_epsilon"], foreign.model["attention"]["kv_channels"]) == (1e-5, 4)
    _, foreign = read_foreign(PUBLISHED["mixtral"], "config.json")
    assert foreign.model["attention"]["rope"]["rotary_base"] == 1e6


@pytest.mark.parametrize("name, changes, match", [
    ("qwen3-moe", {"attn_temperature": 2}, "attn_temperature=2: is not a known field of a qwen3-moe model"),
    ("qwen3-moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2: only 1"),
    ("qwen3-moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]: only the first layers may be dense"),
    ("qwen3-moe", {"mlp_only_layers": 1}, "mlp_only_layers=1: only the first"),
    ("qwen3-moe", {"use_sliding_window": True}, "use_sliding_window=True: only False"),
    ("qwen3-moe", {"norm_topk_prob": "yes"}, "norm_topk_prob='yes': must be true or false"),
    ("qwen3-moe", {"num_local_experts": 5}, "num_experts=4: num_local_experts=5 contradicts it"),
    ("qwen3-moe", {"num_key_value_heads": None}, "num_key_value_heads is missing"),
    ("qwen3-moe", {"rope_scaling": {"type": "default", "mrope_section": [1]}}, "rope_scaling: mrope_section="),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0: only None"),
    ("olmoe", {"head_dim": 8}, "head_dim=8: is not a known field of a olmoe model"),
    ("mixtral", {"sliding_window": 4096}, "sliding_window=4096: only None"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.*: only 'full_attention'"),
])  # fmt: skip
def test_fields_that_cannot_be_converted_are_named(name, changes, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        read_foreign({**PUBLISHED[name], **changes}, "config.json")
    assert "\n" not in str(caught.value)


GQA = {
    "model__attention__type": "gqa",
    "model__attention__num_query_groups": 2,
    "model__attention__kv_channels": 8,
    "model__first_k_dense_replace": 0,
    "model__moe__moe_shared_expert_intermediate_size": 0,
}


@pytest.mark.parametrize("name, overrides, match", [
    ("qwen3-moe", {**GQA}, "model.attention.qk_layernorm='none': .* a qwen3-moe model has 'head'"),
    ("olmoe", {**GQA, "model__attention__qk_layernorm": "head"}, "qk_layernorm='head': .* has 'all_heads'"),
    ("mixtral", {**GQA, "model__attention__add_qkv_bias": True}, "add_qkv_bias=True: .* a mixtral model has False"),
    ("mixtral", {**GQA}, "norm_topk_prob=False: .* a mixtral model has True"),
    ("deepseek-v2", {**GQA}, "model.attention.type='gqa': .* a deepseek-v2 model has 'mla'"),
    ("deepseek-v2", {}, "moe_shared_expert_intermediate_size=32: .* a deepseek-v2 model has 24"),
    (
        "deepseek-v2",
        {"model__layernorm_epsilon": 1e-5, "model__moe__moe_shared_expert_intermediate_size": 24},
        "latent_layernorm_epsilon=None: .* has 1e-06",
    ),
    ("deepseek-v3", {}, "moe_router_score_function='softmax': .* a deepseek-v3 model has 'sigmoid'"),
])  # fmt: skip
def test_models_that_a_format_cannot_hold_are_refused(name, overrides, match):
    config = tiny_config(**overrides)
    with pytest.raises(ConfigError, match=f"{match}"):
        BY_NAME[name].require_holds(config, ForeignModel({}, 40, num_experts=4, top_k=2))


def test_group_limits_are_refused_where_a_format_has_none():
    groups = (
        "[{modality: text, size: 4, moe_router_topk: 2, moe_router_num_groups: 2, moe_router_group_topk: 1},"
        " {modality: audio, size: 4, moe_router_topk: 2}]"
    )
    wanted = {**GQA, "model__moe__norm_topk_prob": True, "model__moe__moe_ffn_hidden_size": 64}
    config = tiny_config(**wanted, model__moe__groups=groups)
    with pytest.raises(ConfigError, match="moe_router_num_groups.*a mixtral model has no group limits"):
        BY_NAME["mixtral"].target(config, "text", None)


def test_the_command_offers_every_format():
    assert sorted(FORMATS) == sorted(BY_NAME)
