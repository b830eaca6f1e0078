"""The recipes in examples/configs and examples/sweeps are what they say, and fit."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_most.checkpointing.metadata import check_same_model
from megatron_most.config import RunConfig, load_config
from megatron_most.conversion.architectures import read_foreign
from megatron_most.conversion.import_config import ImportOptions, import_config
from megatron_most.planning import GPUS, describe_run
from megatron_most.sweep.plan import plan_runs
from megatron_most.sweep.spec import load_sweep
from tests.unit.checkpointing.test_metadata import metadata_of

CONFIGS = Path(__file__).parents[3] / "examples" / "configs"
SWEEPS = CONFIGS.parent / "sweeps"
RECIPES = sorted(path.stem for path in CONFIGS.glob("most_*.yaml"))

DEEPSEEK_V2_LITE = {
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 1408,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
    },
    "torch_dtype": "bfloat16",
}
LLAMA_3_2_3B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MOONLIGHT_16B_A3B = {
    "model_type": "deepseek_v3",
    "vocab_size": 163840,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.446,
    "rms_norm_eps": 1e-05,
    "rope_theta": 50000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
OLMOE_1B_7B = {
    "model_type": "olmoe",
    "attention_bias": False,
    "clip_qkv": None,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 50304,
}
QWEN_1_5_MOE = {
    "model_type": "qwen2_moe",
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_window_layers": 21,
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
"""What ``config.json`` of the base models says."""
PARTITIONED = {
    "most_30b_qwen3": (QWEN3_30B_A3B, 30_532_122_624),
    "most_16b_moonlight": (MOONLIGHT_16B_A3B, 15_960_110_208),
    "most_7b_olmoe": (OLMOE_1B_7B, 6_919_161_856),
    "most_14b_qwen2": (QWEN_1_5_MOE, 14_315_784_192),
    "most_47b_mixtral": (MIXTRAL_8X7B, 46_702_792_704),
}
"""Recipe -> its base, and the base's parameters as published."""


def recipe(name: str) -> RunConfig:
    return load_config(CONFIGS / f"{name}.yaml")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_for_how_many_gpus_it_is_and_fits_them(name: str) -> None:
    header = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").split("\nrun_dir")[0]
    [gpus] = re.findall(r"Laid out for (\d+) H100s", header)
    text = describe_run(recipe(name), int(gpus))
    assert "h100: yes" in text
    assert f"ranks: {gpus} (" in text


def test_all_recipes_are_there() -> None:
    assert RECIPES == [
        "most_14b_qwen2",
        "most_16b_expand",
        "most_16b_librispeech",
        "most_16b_moonlight",
        "most_16b_stage1",
        "most_16b_stage2",
        "most_30b_qwen3",
        "most_3b_upcycled",
        "most_47b_mixtral",
        "most_7b_olmoe",
        "most_debug",
    ]


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("most_16b_stage1", DEEPSEEK_V2_LITE),
        ("most_16b_stage2", DEEPSEEK_V2_LITE),
        ("most_16b_librispeech", DEEPSEEK_V2_LITE),
        ("most_16b_expand", DEEPSEEK_V2_LITE),
        ("most_3b_upcycled", LLAMA_3_2_3B),
        *((name, base) for name, (base, _) in PARTITIONED.items()),
    ],
)
def test_models_are_those_that_conversion_makes_of_the_base(name: str, base: dict[str, Any]) -> None:
    config = recipe(name)
    _, foreign = read_foreign(base, name)
    assert contains(dataclasses.asdict(config.model), foreign.model) == []
    assert config.vocab.text_vocab_size == foreign.vocab_size
    assert (config.precision.dtype, foreign.dtype) == ("bf16", torch.bfloat16)
    text, audio = config.model.moe.groups
    if foreign.num_experts:
        share = foreign.num_experts // (1 if name == "most_16b_expand" else 2)
        sizes = (share, share)
        assert (text.size, audio.size, text.moe_router_topk, audio.moe_router_topk) == (
            *sizes,
            foreign.top_k,
            foreign.top_k,
        )
    else:
        assert config.model.moe.norm_topk_prob


@pytest.mark.parametrize(
    ("name", "mode", "base"),
    [
        ("most_16b_stage1", "partition", DEEPSEEK_V2_LITE),
        ("most_16b_librispeech", "partition", DEEPSEEK_V2_LITE),
        ("most_16b_expand", "expand", DEEPSEEK_V2_LITE),
        ("most_3b_upcycled", "upcycle", LLAMA_3_2_3B),
        *((name, "partition", base) for name, (base, _) in PARTITIONED.items()),
    ],
)
def test_the_command_in_a_recipe_makes_a_checkpoint_that_the_recipe_takes(
    name: str, mode: str, base: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    start = next(index for index, line in enumerate(lines) if "most convert import" in line)
    command = " ".join(line.strip("# \\") for line in lines[start : start + 2]).split()
    options = dict(zip(command[3::2], command[4::2], strict=True))
    assert options["--experts"] == mode
    config = dataclasses.replace(recipe(name), tokenizer=None, codec=None)
    architecture, foreign = read_foreign(base, name)
    monkeypatch.chdir(CONFIGS.parents[1])
    wanted = ImportOptions(mode, options.get("--audio-vocab"), options.get("--config"))
    converted = import_config(SimpleNamespace(directory=name), architecture, foreign, mode, wanted)
    assert config.checkpoint.load == options["--out"]
    check_same_model(Path(options["--out"]), metadata_of(converted), config)


def contains(whole: dict[str, Any], part: dict[str, Any], path: str = "") -> list[str]:
    """Fields of ``part`` that ``whole`` has otherwise."""
    found = []
    for key, value in part.items():
        if isinstance(value, dict):
            found += contains(whole[key], value, f"{path}{key}.")
        elif whole[key] != value:
            found.append(f"{path}{key}: {whole[key]!r}, the base has {value!r}")
    return found


def test_deepseek_v2_lite_is_counted_as_published() -> None:
    text = describe_run(recipe("most_16b_stage1"), 64)
    assert "adds to the base model's tables: 15,706,484,224\n" in text


@pytest.mark.parametrize("name", PARTITIONED)
def test_bases_are_counted_as_published(name: str) -> None:
    biases = 26 * 64 if name == "most_16b_moonlight" else 0  # of experts: no parameters here
    expected = PARTITIONED[name][1] - biases
    assert f"adds to the base model's tables: {expected:,}\n" in describe_run(recipe(name), 64)


def test_stages_follow_the_paper() -> None:
    one, two = recipe("most_16b_stage1"), recipe("most_16b_stage2")
    assert (one.training.train_iters, one.training.global_batch_size) == (500_000, 512)
    assert (two.training.train_iters, two.training.global_batch_size) == (10_000, 128)
    assert blend(one) == {"asr": 0.4, "tts": 0.4, "refinedweb": 0.2}
    assert blend(two) == {"spoken": 0.4, "smoltalk": 0.4, "asr": 0.1, "tts": 0.1}
    # Stage 2 goes on from the weights of stage 1's run in a directory of its own: fresh optimizer, fresh data.
    assert two.checkpoint.load == one.run_dir != two.run_dir
    assert (two.model, two.vocab, two.codec, two.tokenizer) == (one.model, one.vocab, one.codec, one.tokenizer)
    assert "5e-5" in (CONFIGS / "most_16b_stage1.yaml").read_text(encoding="utf-8")


def blend(config: RunConfig) -> dict[str, float]:
    """Summed weights by the last word of the datasets' names."""
    shares: dict[str, float] = {}
    for entry in config.data.train:
        task = Path(entry.path).name.split("_")[-1]
        shares[task] = round(shares.get(task, 0.0) + entry.weight, 6)
    return shares


def test_debug_has_every_part_of_the_recipes() -> None:
    debug, recipe_of_the_paper = recipe("most_debug"), recipe("most_16b_stage1")
    assert debug.part_names == recipe_of_the_paper.part_names
    assert debug.model.attention.rope.rope_type == recipe_of_the_paper.model.attention.rope.rope_type
    on_cpu = load_config(CONFIGS / "most_debug.yaml", ["precision.dtype=fp32", "optimizer.overlap_grad_reduce=false"])
    assert on_cpu.num_microbatches(on_cpu.parallel.data_parallel_size(2)) == 4


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("16b_*.yaml")), ids=lambda path: path.stem)
def test_every_run_of_a_sweep_fits_its_gpus(path: Path) -> None:
    fullest = {run.variant.name: run.memory for run in plan_runs(load_sweep(path))}
    assert {name: memory for name, memory in fullest.items() if memory > GPUS["h100"].usable} == {}
