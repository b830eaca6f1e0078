"""Loading, overriding and checking configurations; every error is one line that names field, value and rule."""

import math
import os
import time
import typing

import pytest

from megatron_most.config import RunConfig, dump_config, load_config
from megatron_most.config.load import build_config, check_shape
from megatron_most.errors import ConfigError
from megatron_most.keys import Key, keys_of

YAML = """
vocab: {text_vocab_size: 100, num_codebooks: 4, codebook_size: 1000}
model:
  num_layers: 4
  moe:
    groups:
      - {modality: text, size: 4, moe_router_topk: 2}
      - {modality: audio, size: 4, moe_router_topk: 2}
data:
  train: [{path: data/asr, weight: 0.4}]
"""

# Everything but what the test is about can be split in three.
FUSED = ["model.attention.mla_down_proj_fusion=true", "model.attention.q_lora_rank=64"]
TENSOR_3 = [
    "parallel.tensor_model_parallel_size=3",
    "model.attention.num_attention_heads=12",
    "model.ffn_hidden_size=96",
    "model.moe.moe_shared_expert_intermediate_size=96",
    "data.seq_length=96",
]


@pytest.fixture
def load(tmp_path):
    def load(*overrides: str, text: str = YAML) -> RunConfig:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return load_config(path, overrides)

    return load


@pytest.fixture
def error(load):
    def error(*overrides: str, text: str = YAML) -> str:
        with pytest.raises(ConfigError) as caught:
            load(*overrides, text=text)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return error


def test_values_overrides_and_defaults_come_together(load):
    config = load("optimizer.lr=2e-3", "training.micro_batch_size=1", "tokenizer=a.model", "run_dir=runs/a=b")
    assert config.model.num_layers == 4
    assert config.optimizer.lr == 2e-3
    assert config.optimizer.adam_beta2 == 0.95
    assert config.tokenizer == "a.model"
    assert config.run_dir == "runs/a=b"
    assert config.vocab.frame == 102
    assert config.data.train[0].weight == 0.4


@pytest.mark.parametrize("key", ["model.moe.groups.0.size", "model.moe.groups.1.size"])
def test_an_override_reaches_into_a_list(load, key):
    sizes = [group.size for group in load(f"{key}=8").model.moe.groups]
    assert sizes == ([8, 4] if ".0." in key else [4, 8])


def test_a_later_override_wins_and_sections_merge(load):
    config = load("model={num_layers: 6}", "model.num_layers=8", "parallel.expert_tensor_parallel_size=null")
    assert config.model.num_layers == 8
    assert config.model.moe.num_experts == 8
    assert config.parallel.expert_tensor_parallel_size is None


def test_a_required_section_may_come_from_overrides_alone(load):
    overrides = ["vocab.text_vocab_size=10", "vocab.num_codebooks=2", "vocab.codebook_size=8"]
    assert load(*overrides, text="seed: 7\n").vocab.size == 13


def test_interpolation_is_resolved(load, monkeypatch):
    monkeypatch.setenv("MOST_TEST_ROOT", "/data/runs")
    config = load("run_dir=${oc.env:MOST_TEST_ROOT}/a", "optimizer.min_lr=${optimizer.lr}")
    assert config.run_dir == "/data/runs/a"
    assert config.optimizer.min_lr == config.optimizer.lr


def test_config_dir_is_the_folder_of_the_file(load, tmp_path):
    paths = "tokenizer: ${config_dir}/tokenizer\ncheckpoint: {load: '${config_dir}'}\n"
    config = load("codec=./x.nemo", text=paths + YAML.replace("data/asr", "'${config_dir}/data/asr'"))
    assert (config.tokenizer, config.checkpoint.load) == (f"{tmp_path}/tokenizer", str(tmp_path))
    assert (config.codec, config.data.train[0].path) == ("./x.nemo", f"{tmp_path}/data/asr")


def test_a_dumped_config_loads_to_an_equal_one(load, tmp_path):
    config = load("optimizer.lr=3e-4", "model.moe.groups.0.size=6", "codec=x.nemo")
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.moe.gruops=[]", "model.moe.gruops: unknown key; did you mean 'groups'?"),
        ("modle.num_layers=3", "modle: unknown key; did you mean 'model'?"),
        ("--lr=3", "--lr: unknown key; valid: vocab, run_dir, "),
        ("model.moe.groups.0.sise=8", "model.moe.groups[0].sise: unknown key; did you mean 'size'?"),
        ("data.train=[{pth: a}]", "data.train[0].pth: unknown key; did you mean 'path'?"),
        ("model.num_layers=x", "model.num_layers='x': must be an integer"),
        ("model.num_layers=1.5", "model.num_layers=1.5: must be an integer"),
        ("model.num_layers=true", "model.num_layers=True: must be an integer"),
        ("model.num_layers=", "model.num_layers=None: must be an integer"),
        ("optimizer.lr=fast", "optimizer.lr='fast': must be a number"),
        (
            "optimizer.use_distributed_optimizer=maybe",
            "optimizer.use_distributed_optimizer='maybe': must be true or false",
        ),
        ("run_dir=[a]", "run_dir=['a']: must be text"),
        ("model.codebook_loss_weights=[1, a]", "model.codebook_loss_weights[1]='a': must be a number"),
        ("data.train=[{path: a, weight: x}]", "data.train[0].weight='x': must be a number"),
        ("model=3", "model=3: must be a section"),
        ("model.moe.groups=3", "model.moe.groups=3: must be a list"),
        ("vocab=null", "vocab=None: must be a section"),
        ("model.moe.groups.5.size=8", "model.moe.groups has no entry '5'; it holds 2, counted from 0"),
        ("model.moe.groups.x.size=8", "model.moe.groups has no entry 'x'"),
        ("model.num_layers.x=3", "model.num_layers is a single value and has no 'x'"),
        ("data.train=[1", "the value is not readable as YAML"),
        ("foo", "must have the form key=value"),
        ("=3", "must have the form key=value"),
    ],
)
def test_a_wrong_override_is_quoted_with_the_rule(error, override, message):
    assert error(override).startswith(f"override {override!r}: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (YAML + "lr: 3\n", "lr: unknown key; valid: vocab, "),
        (YAML + "optim: {lr: 3}\n", "optim: unknown key; did you mean 'optimizer'?"),
        (YAML + "optimizer: {lr: fast}\n", "optimizer.lr='fast': must be a number"),
        (YAML.replace("path: data/asr, ", ""), "data.train[0].path: a value is required"),
        ("model: {num_layers: 4}\n", "vocab: a value is required"),
        ("", "vocab: a value is required"),
        ("vocab: {num_codebooks: 4}\n", "vocab.codebook_size, vocab.text_vocab_size: a value is required"),
        ("- a\n- b\n", "must hold a mapping of keys to values"),
        ("vocab: [1\n", "not readable as YAML: "),
        (YAML + "model: {num_layers: 5}\n", "not readable as YAML: found duplicate key model (line 11, column 1)"),
        ("run_dir: ${nowhere}\n" + YAML, "Interpolation key 'nowhere' not found"),
    ],
)
def test_a_wrong_file_is_named_with_the_rule(error, tmp_path, text, message):
    assert error(text=text).startswith(f"{tmp_path / 'run.yaml'}: {message}")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match="absent.yaml: no such file"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="binary.yaml: not readable as YAML"):
        load_config(tmp_path / "binary.yaml")
    with pytest.raises(ConfigError, match="not a regular file"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["vocab.layout=delay"], "vocab.layout='delay': must be one of frame, frame_delay, flat, flat_delay"),
        (["vocab.num_codebooks=0"], "vocab.num_codebooks=0: must be at least 1"),
        (["checkpoint.keep_last=0"], "checkpoint.keep_last=0: must be greater than 0"),
        (
            ["checkpoint.save_interval=200", "checkpoint.save_retain_interval=300"],
            "checkpoint.save_retain_interval=300: must be a multiple of checkpoint.save_interval, 200",
        ),
        (
            ["model.moe.groups.0.moe_router_topk=9"],
            "model.moe.groups[text].moe_router_topk=9: must not exceed the 4 experts",
        ),
        (["model.moe.groups.1.modality=text"], "model.moe.groups=['text', 'text']: names a modality twice"),
        (["model.moe.groups.1.modality=video"], "needs one group for each modality, in this order: text, audio"),
        (["vocab.further_modalities=[{name: image, start: 9, stop: 19}]"], "in this order: text, audio, image"),
        (["vocab.further_modalities=[{name: image, start: 9, stop: 101}]"], "must be a range of the 100 text ids"),
        (["vocab.further_modalities=[{name: text, start: 9, stop: 19}]"], "names must differ, got text, audio, text"),
        (
            ["vocab.further_modalities=[{name: a, start: 9, stop: 19}, {name: b, start: 18, stop: 20}]"],
            "vocab.further_modalities[b]=18..20: overlaps another modality's range",
        ),
        (["model.moe.score_rule=none"], "model.moe.score_rule='none': must be one of group, all"),
        (["model.first_k_dense_replace=4"], "model.first_k_dense_replace=4: must leave at least one of the 4 layers"),
        (["model.attention.qk_pos_emb_head_dim=3"], "model.attention.qk_pos_emb_head_dim=3: must be even"),
        (["model.attention.qk_head_dim=3"], "model.attention.qk_head_dim=3: must be even"),
        (["model.codebook_loss_weights=[1, 2]"], "needs one weight for each of the 4 codebooks"),
        (["parallel.expert_model_parallel_size=3"], "must divide the 8 experts"),
        (["model.attention.type=mha"], "model.attention.type='mha': must be one of mla, gqa"),
        (
            ["model.attention.type=gqa", "model.attention.num_query_groups=3"],
            "must divide model.attention.num_attention_heads, 16",
        ),
        (["model.attention.qk_layernorm=head"], "qk_layernorm='head': needs model.attention.type=gqa"),
        (["model.attention.qk_layernorm=both"], "qk_layernorm='both': must be one of none, head, all_heads"),
        (["model.attention.add_qkv_bias=true"], "add_qkv_bias=True: needs model.attention.type=gqa"),
        (
            ["model.attention.type=gqa", "model.attention.latent_layernorm_epsilon=1e-6"],
            "latent_layernorm_epsilon=1e-06: needs model.attention.type=mla",
        ),
        (
            ["model.moe.moe_shared_expert_gate=true", "model.moe.moe_shared_expert_intermediate_size=0"],
            "moe_shared_expert_gate=True: needs shared experts (moe_shared_expert_intermediate_size)",
        ),
        (
            ["model.attention.mla_down_proj_fusion=true"],
            "mla_down_proj_fusion=True: needs model.attention.type=mla with a q_lora_rank",
        ),
        (
            [*FUSED, "optimizer.optimizer=muon", "optimizer.use_distributed_optimizer=false"],
            "mla_down_proj_fusion=True: needs optimizer.optimizer=adam",
        ),
        (
            [*FUSED, "precision.fp8=hybrid", "precision.fp8_recipe=delayed"],
            "needs a precision.fp8_recipe other than delayed",
        ),
        (["optimizer.optimizer=sgd"], "optimizer.optimizer='sgd': must be one of adam, muon"),
        (["optimizer.optimizer=muon"], "optimizer.optimizer='muon': needs optimizer.use_distributed_optimizer=false"),
        (["optimizer.muon_num_ns_steps=0"], "optimizer.muon_num_ns_steps=0: must be greater than 0"),
        (["optimizer.muon_momentum=1"], "optimizer.muon_momentum=1.0: must be in [0, 1)"),
        (["optimizer.muon_scale_mode=rms"], "muon_scale_mode='rms': must be one of spectral, shape_scaling"),
        (["model.attention.rope.rotary_base=1"], "model.attention.rope.rotary_base=1.0: must be greater than 1"),
        (["model.attention.rope.beta_slow=0"], "model.attention.rope.beta_slow=0.0: must be greater than 0"),
        (["model.attention.rope.mscale=-1"], "model.attention.rope.mscale=-1.0: must not be negative"),
        (
            [
                "parallel.context_parallel_size=2",
                "data.document_multiple=4",
                "model.attention.rope.rope_type=yarn",
                "model.attention.rope.original_max_position_embeddings=4098",
            ],
            "original_max_position_embeddings=4098: must be divisible by 4, twice the context parallel size",
        ),
        (
            ["model.attention.rope.rope_type=llama3"],
            "model.attention.rope.rope_type='llama3': needs model.attention.type=gqa",
        ),
        (
            ["parallel.tensor_model_parallel_size=4", "model.attention.type=gqa", "model.attention.num_query_groups=2"],
            "tensor_model_parallel_size=4: must divide model.attention.num_query_groups, 2",
        ),
        (["parallel.tensor_model_parallel_size=3"], "must divide model.attention.num_attention_heads, 16"),
        (
            [*TENSOR_3, "model.ffn_hidden_size=64"],
            "tensor_model_parallel_size=3: must divide model.ffn_hidden_size, 64",
        ),
        (
            [*TENSOR_3, "model.moe.moe_shared_expert_intermediate_size=64"],
            "must divide model.moe.moe_shared_expert_intermediate_size, 64",
        ),
        (
            [*TENSOR_3, "model.first_k_dense_replace=0"],
            "must divide the multiple to which ids and codes are padded, 128",
        ),
        (
            ["parallel.tensor_model_parallel_size=2", "model.moe.moe_ffn_hidden_size=65"],
            "parallel.expert_tensor_parallel_size=2: must divide model.moe.moe_ffn_hidden_size, 65",
        ),
        (["parallel.expert_tensor_parallel_size=3"], "must divide model.moe.moe_ffn_hidden_size, 1408"),
        (
            ["model.moe.moe_ffn_hidden_size=68"],
            "model.moe.expert_backend='grouped': needs rows of a multiple of 16 bytes",
        ),
        (["model.hidden_size=2052"], "must be divisible by 8 in bf16"),
        (["model.hidden_size=2050", "precision.dtype=fp32"], "must be divisible by 4 in fp32"),
        (
            ["parallel.expert_tensor_parallel_size=2", "model.moe.moe_ffn_hidden_size=72"],
            "rank's share of model.moe.moe_ffn",
        ),
        (
            ["model.moe.moe_token_dispatcher_type=deepep"],
            "model.moe.moe_token_dispatcher_type='deepep': needs experts on several ranks",
        ),
        (
            ["model.moe.moe_token_dispatcher_type=hybridep"],
            "model.moe.moe_token_dispatcher_type='hybridep': needs experts on several ranks",
        ),
        (
            ["model.moe.moe_token_dispatcher_type=allgather", "model.moe.moe_shared_expert_overlap=true"],
            "moe_shared_expert_overlap=True: needs shared experts (moe_shared_expert_intermediate_size) and"
            " moe_token_dispatcher_type=alltoall",
        ),
        (["parallel.pipeline_model_parallel_size=3"], "must divide model.num_layers, 4"),
        (["parallel.virtual_pipeline_model_parallel_size=2"], "needs pipeline_model_parallel_size of at least 2"),
        (
            ["training.recompute=moe_act", "model.moe.expert_backend=sequential"],
            "training.recompute='moe_act': needs model.moe.expert_backend=grouped or transformer_engine",
        ),
        (
            ["training.recompute=moe_act", "precision.fp8=e4m3"],
            "training.recompute='moe_act': needs model.moe.expert_backend=grouped or transformer_engine,"
            " and precision.fp8=off",
        ),
        (["parallel.context_parallel_size=2", "data.seq_length=34"], "data.seq_length=34: must be divisible by 4"),
        (["parallel.context_parallel_size=2"], "data.document_multiple=1: must be divisible by 4, twice the context"),
        (["data.document_multiple=3"], "data.document_multiple=3: must divide data.seq_length, 4096"),
        (["training.micro_batch_size=2"], "training.micro_batch_size=2: must be 1 with data.packing"),
        (["optimizer.lr_warmup_iters=1000"], "must be less than training.train_iters, 1000"),
        (
            ["optimizer.lr_scales=[{part: experts.video, scale: 0}]"],
            "must be one of experts.text, experts.audio, shared",
        ),
        (["optimizer.lr_scales=[{part: routers, scale: -1}]"], "lr_scales[routers].scale=-1.0: must not be negative"),
        (["optimizer.lr_scales=[{part: heads, scale: 0}, {part: heads, scale: 1}]"], "names a part twice"),
        (["optimizer.min_lr=1"], "optimizer.min_lr=1.0: must not exceed optimizer.lr"),
        (["optimizer.grad_norm_skip_threshold=0"], "grad_norm_skip_threshold=0.0: must be greater than 0, or null"),
        (["optimizer.grad_norm_skip_threshold=.inf"], "grad_norm_skip_threshold=inf: must be a finite number"),
        (["data.audio_frame_dropout=1"], "data.audio_frame_dropout=1.0: must be in [0, 1)"),
        (["data.train.0.weight=0"], "data: weight of data/asr=0.0: must be greater than 0"),
        (["data.validation=[{path: data/dev, weight: 0}]"], "data: weight of data/dev=0.0: must be greater than 0"),
    ],
)
def test_a_broken_rule_names_field_value_and_rule(error, overrides, message):
    assert message in error(*overrides)


def test_sizes_that_grouped_experts_do_not_take_are_left_to_sequential_ones(load):
    assert load("model.moe.moe_ffn_hidden_size=68", "precision.dtype=fp32").model.moe.expert_backend == "grouped"
    assert (
        load("model.moe.moe_ffn_hidden_size=65", "model.moe.expert_backend=sequential").model.moe.moe_ffn_hidden_size
        == 65
    )


def test_a_layout_that_does_not_fit_the_world_is_refused(load):
    parallel = load("parallel.expert_model_parallel_size=4").parallel
    assert parallel.data_parallel_size(4) == 4
    with pytest.raises(ConfigError, match="expert tensor x expert x pipeline = 4 ranks, but only 2 were started"):
        parallel.data_parallel_size(2)
    with pytest.raises(ConfigError, match="must divide the world size, 6"):
        parallel.data_parallel_size(6)


def test_a_batch_that_does_not_fit_the_ranks_is_refused(load):
    config = load("training.global_batch_size=6")
    assert config.num_microbatches(3) == 2
    with pytest.raises(ConfigError, match="training.global_batch_size=6: must be divisible"):
        config.num_microbatches(4)


def test_what_no_layer_has_need_not_be_divisible(load):
    none = [
        "model.first_k_dense_replace=0",
        "model.ffn_hidden_size=63",
        "model.moe.moe_shared_expert_intermediate_size=0",
    ]
    assert load("parallel.tensor_model_parallel_size=2", *none).parallel.tensor_model_parallel_size == 2


def test_virtual_stages_need_a_multiple_of_the_pipeline_size(load):
    stages = ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"]
    assert load("training.global_batch_size=4", *stages).num_microbatches(1) == 4
    with pytest.raises(ConfigError, match="gives 3 micro-batches on each rank; .* need a multiple of 2"):
        load("training.global_batch_size=3", *stages).num_microbatches(1)


def test_values_may_come_from_a_program():
    config = build_config("here", {"vocab": {"text_vocab_size": 1, "num_codebooks": 1, "codebook_size": 2}})
    assert config.vocab.size == 4
    with pytest.raises(ConfigError, match="here: vocab.layuot: unknown key; did you mean 'layout'"):
        build_config("here", {"vocab": {"layuot": "flat"}})


def nested(key: Key, value: object) -> object:
    """The configuration that holds nothing but ``value`` at ``key``."""
    if typing.get_origin(key.hint) is list:
        value = [value]
    for name in reversed(key.path.split(".")):
        value = {name[:-2]: [value]} if name.endswith("[]") else {name: value}
    return value


def values_of(*hints: object) -> list:
    return [pytest.param(key, id=key.path) for key in keys_of(RunConfig) if key.hint in hints]


@pytest.mark.parametrize("key", values_of(float, float | None, list[float]))
def test_every_number_is_finite(key):
    for number in (math.inf, -math.inf, math.nan, 10**400):
        with pytest.raises(ConfigError, match="must be a finite number"):
            check_shape(nested(key, number), RunConfig, "", "run.yaml")


@pytest.mark.parametrize("key", values_of(int, int | None, list[int]))
def test_every_integer_has_a_range(key):
    for number, rule in ((2**31, "must be at most "), (10**5000, "must be at most "), (-(2**31), "must be at least -")):
        with pytest.raises(ConfigError, match=rule):
            check_shape(nested(key, number), RunConfig, "", "run.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=" + "9" * 30, "seed=" + "9" * 30 + ": must be at most 2,147,483,647"),
        ("seed=-3000000000", "seed=-3000000000: must be at least -2,147,483,647"),
        ("seed=0x" + "f" * 9000, "not readable as YAML: a number of 9,002 digits"),
        ("training.threads_per_rank=1000000", "training.threads_per_rank=1000000: must be at most 1,024"),
        ("model.num_layers=1000000000", "model.num_layers=1000000000: must be at most 10,000"),
        ("model.moe.groups.0.size=100000000", "model.moe.groups[0].size=100000000: must be at most 65,536"),
        ("optimizer.lr=.inf", "optimizer.lr=inf: must be a finite number"),
        ("data.train.0.weight=1e999", "data.train[0].weight=inf: must be a finite number"),
        ("optimizer.lr_scales=[{part: heads, scale: .nan}]", "lr_scales[0].scale=nan: must be a finite number"),
        (r'run_dir="a\0b"', "must hold no NUL and no half of a surrogate pair"),
        (r'data.train.0.path="\ud800"', "must hold no NUL and no half of a surrogate pair"),
    ],
)
def test_values_that_no_run_can_have_are_refused(error, override, message):
    assert message in error(override)
    key, _, value = override.partition("=")
    assert message in error(text=YAML + f"{key}: {value}\n") or "." in key


def test_values_from_the_environment_are_checked(error, monkeypatch):
    monkeypatch.setenv("RATE", "inf")
    assert "optimizer.lr=inf: must be a finite number" in error("optimizer.lr=${oc.env:RATE}")


def test_a_long_value_is_cut_in_the_message(error):
    assert len(error("optimizer.lr=" + "x" * 100_000).partition(": optimizer.lr=")[2]) < 300


ALIAS_BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{level}: &a{level} [{','.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: !!int x", "not readable as YAML: invalid literal"),
        ("seed: !!float x", "not readable as YAML: could not convert"),
        ("seed: " + "9" * 5000, "not readable as YAML: a number of 5,000 digits in line 5"),
        ("seed: " + "1:" * 10_000 + "1", "not readable as YAML: a number of 20,001 digits in line 5"),
        ("seed: !!bool x", "not readable as YAML: a value does not fit its tag"),
        ("a: !!timestamp x", "not readable as YAML: a value does not fit its tag"),
        ("a: !!int ''", "not readable as YAML: a value does not fit its tag"),
        ("run_dir: " + "${a}" * 2000, "not readable as YAML: more than 1,000 interpolations in line 5"),
        ("run_dir: " + "${" * 900 + "}" * 900, "an interpolation must be ${section.key}"),
        ("run_dir: ${oc.create:x}", "an interpolation must be ${section.key}"),
        ("run_dir: ${a.${b}}", "an interpolation must be ${section.key}"),
        ("a: " + "[" * 5000, "not readable as YAML: nested deeper than 64 levels in line 5"),
        ("\n".join(" " * depth + "a:" for depth in range(200)), "not readable as YAML: nested deeper than 64 levels"),
        (ALIAS_BOMB, "not readable as YAML: more than 100,000 values"),
        ("a: &a [*a]", "not readable as YAML: *a in line 5 stands inside what it repeats"),
        ("a: *nowhere", "not readable as YAML: found undefined alias"),
        ("a: !!python/object/apply:os.getcwd []", "not readable as YAML: could not determine a constructor"),
        ("# " + "x" * (1 << 20), "not readable as YAML: larger than 1 MiB"),
    ],
    ids=lambda value: value[:20],
)
def test_hostile_yaml_is_one_line(error, text, message):
    preamble = "\n" * 4
    assert message in error(text=preamble + text + "\n")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("!!int x", "the value is not readable as YAML: invalid literal"),
        ("9" * 5000, "the value is not readable as YAML: a number of 5,000 digits"),
        ("${oc.create:x}", "an interpolation must be ${section.key}"),
        ("[" * 5000, "the value is not readable as YAML: nested deeper than 64 levels"),
        ("{a: &a [x], b: *c}", "the value is not readable as YAML: found undefined alias"),
    ],
    ids=lambda value: value[:20],
)
def test_hostile_overrides_are_one_line(error, value, message):
    found = error(f"seed={value}")
    assert message in found and len(found) < 500


def test_aliases_and_merged_keys_are_read(load):
    text = YAML.replace(
        "{modality: text, size: 4, moe_router_topk: 2}", "&group {modality: text, size: 4, moe_router_topk: 2}"
    )
    text = text.replace("{modality: audio, size: 4, moe_router_topk: 2}", "{<<: *group, modality: audio}")
    assert [
        group.size
        for group in load(
            text=text,
        ).model.moe.groups
    ] == [4, 4]


def doubling(count: int) -> str:
    """A configuration in which each of ``count`` paths is the one before twice."""
    paths = ["x" * 10, *(f"${{data.validation[{place}].path}}" * 2 for place in range(count - 1))]
    return YAML + "  validation:\n" + "".join(f"    - {{path: '{path}'}}\n" for path in paths)


def test_interpolations_that_double_are_one_line(load, error):
    assert len(load(text=doubling(6)).data.validation[5].path) == 320
    start = time.monotonic()
    for found in (
        error(text=doubling(40)),
        error("data.validation.0.path=${run_dir}", "run_dir=${data.validation[39].path}", text=doubling(40)),
    ):
        assert "interpolations make more than 100,000 values or 1 MiB of text" in found and len(found) < 500
    assert "interpolations" in error(text=doubling(80))
    assert time.monotonic() - start < 60


def test_an_interpolation_of_itself_is_one_line(error):
    assert "Recursive interpolation" in error("seed=${seed}")
    assert "Recursive interpolation" in error("run_dir=${tokenizer}", "tokenizer=${run_dir}")


def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "run.yaml")
    for path in (tmp_path / "run.yaml", tmp_path, "/dev/zero"):
        with pytest.raises(ConfigError, match="not a regular file"):
            load_config(path)
