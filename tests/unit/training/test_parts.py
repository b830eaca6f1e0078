"""Which weight belongs to which part of the model, by its name; and what a configuration may say of parts."""

from __future__ import annotations

import pytest

from megatron_most.errors import ConfigError
from megatron_most.training.parts import part_of
from tests.distributed.tiny import tiny_config

# A rank with two text experts, an audio expert and a common one, in this order.
POOLS = ["text", "text", "audio", "common"]
LAYER = "decoder.layers.3"

NAMES = {
    "embedding.word_embeddings.weight": "embeddings",
    "module.module.embedding.word_embeddings.weight": "embeddings",
    "codebook_embeddings.weight": "embeddings.audio",
    "output_layer.weight": "heads",
    "module.codebook_heads.weight": "heads.audio",
    "decoder.final_layernorm.weight": "norms",
    f"{LAYER}.input_layernorm.weight": "norms",
    f"{LAYER}.pre_mlp_layernorm.weight": "norms",
    f"{LAYER}.self_attention.kv_layernorm.weight": "norms",
    f"{LAYER}.self_attention.linear_qkv.layer_norm_weight": "norms",
    f"{LAYER}.mlp.linear_fc1.layer_norm_weight": "norms",
    f"{LAYER}.self_attention.linear_qkv.weight": "attention",
    f"{LAYER}.self_attention.linear_kv_down_proj.weight": "attention",
    f"{LAYER}.mlp.linear_fc1.weight": "dense_ffn",
    f"{LAYER}.mlp.router.weight": "routers",
    f"{LAYER}.mlp.shared_experts.linear_fc2.weight": "shared_experts",
    f"{LAYER}.mlp.experts.text_experts.linear_fc1": "experts.text",
    f"{LAYER}.mlp.experts.common_experts.linear_fc2": "experts.common",
    f"{LAYER}.mlp.experts.local_experts.1.linear_fc1.weight": "experts.text",
    f"{LAYER}.mlp.experts.local_experts.2.linear_fc2.weight": "experts.audio",
    f"{LAYER}.mlp.experts.linear_fc1.weight0": "experts.text",
    f"{LAYER}.mlp.experts.linear_fc2.weight3": "experts.common",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_tells_the_part(name):
    assert part_of(name, POOLS) == NAMES[name]


def test_a_weight_of_no_part_is_an_error():
    with pytest.raises(RuntimeError, match="decoder.layers.3.mystery.weight: belongs to no part"):
        part_of(f"{LAYER}.mystery.weight", POOLS)


def test_parts_not_named_take_the_rate_of_the_rest():
    config = tiny_config(optimizer__lr_scales="[{part: heads, scale: 2}, {part: rest, scale: 0.5}]")
    assert config.lr_scale("heads") == 2
    assert config.lr_scale("routers") == 0.5
    assert tiny_config().lr_scale("routers") == 1


def test_audio_parts_follow_the_others_unless_they_are_named():
    """So that a configuration written before there were audio parts means what it meant."""
    config = tiny_config(optimizer__lr_scales="[{part: heads, scale: 2}, {part: rest, scale: 0.5}]")
    assert (config.lr_scale("heads.audio"), config.lr_scale("embeddings.audio")) == (2, 0.5)
    config = tiny_config(optimizer__lr_scales="[{part: heads, scale: 0}, {part: heads.audio, scale: 3}]")
    assert (config.lr_scale("heads"), config.lr_scale("heads.audio")) == (0, 3)
    assert config.lr_scale("experts.audio") == config.lr_scale("embeddings.audio") == 1


@pytest.mark.parametrize(
    "scales, message",
    [
        ("[{part: rest, scale: 0}]", "freezes every part of the model: nothing is left to train"),
        (
            "[{part: tongues, scale: 1}]",
            r"optimizer\.lr_scales\.part='tongues': must be one of experts\.text, .*, rest",
        ),
        ("[{part: norms.audio, scale: 1}]", r"'norms\.audio': must be one of .*, heads\.audio, rest"),
        ("[{part: heads, scale: -1}]", r"optimizer\.lr_scales\[heads\]\.scale=-1\.0: must not be negative"),
        ("[{part: heads, scale: 1}, {part: heads, scale: 2}]", "names a part twice"),
    ],
)
def test_rates_that_make_no_sense_are_refused_in_one_line(scales, message):
    with pytest.raises(ConfigError, match=message) as error:
        tiny_config(optimizer__lr_scales=scales)
    assert "\n" not in str(error.value)


def test_recomputation_by_block_is_refused_in_one_line():
    with pytest.raises(
        ConfigError, match=r"training\.recompute='block': must be one of none, moe_act, moe, full"
    ) as error:
        tiny_config(training__recompute="block")
    assert "\n" not in str(error.value)
