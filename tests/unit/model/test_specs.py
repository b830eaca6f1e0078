"""Which modules stand in a layer under either backend, without Transformer Engine being there."""

from __future__ import annotations

import functools

import pytest
import torch
from megatron.core.extensions import transformer_engine
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_most import parallel, platform
from megatron_most.config import RunConfig
from megatron_most.errors import ConfigError
from megatron_most.model import check_libraries
from megatron_most.model.core_attention import PortableCoreAttention
from megatron_most.model.norm import RMSNorm
from megatron_most.model.specs import block_spec
from megatron_most.model.transformer_config import _transformer_engine_fp8, transformer_config
from megatron_most.moe import ModalityAwareMoELayer, ModalityAwareRouter
from tests.distributed.tiny import tiny_config

ENGINE = (
    transformer_engine.TENorm,
    transformer_engine.TEDotProductAttention,
    transformer_engine.TEColumnParallelLinear,
    transformer_engine.TERowParallelLinear,
    transformer_engine.TELinear,
)
ATTENTION = {
    "mla": {"model__attention__q_lora_rank": 16},
    "mla without q_lora": {},
    "gqa": {
        "model__attention__type": "gqa",
        "model__attention__num_query_groups": 2,
        "model__attention__kv_channels": 16,
        "model__attention__qk_layernorm": "head",
    },
}


@pytest.fixture(autouse=True)
def process_groups():
    parallel.initialize(tiny_config().parallel, seed=1)
    yield
    parallel.destroy()


@pytest.fixture
def engine(monkeypatch):
    """Transformer Engine and a GPU, as far as questions about them go."""
    monkeypatch.setattr(transformer_engine, "HAVE_TE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    kernels = ("permute", "permute_with_probs", "sort_chunks_by_index", "sort_chunks_by_index_with_probs", "unpermute")
    for kernel in kernels:
        monkeypatch.setattr(moe_utils, f"fused_{kernel}", lambda: None)


def modules_of(config: RunConfig, backend: str) -> dict[str, object]:
    """Norms, attention and linear layers by their place; Megatron has stand-ins for the engine's classes."""
    found: dict[str, object] = {}

    def collect(prefix: str, submodules: object) -> None:
        for name, value in vars(submodules).items():
            place = f"{prefix}.{name}"
            if name == "experts":
                continue
            if isinstance(value, functools.partial) and "submodules" in value.keywords:
                collect(place, value.keywords["submodules"])
            elif isinstance(value, ModuleSpec) and value.submodules is not None:
                collect(place, value.submodules)
            elif name.startswith("linear_") or name.endswith("norm") or name == "core_attention":
                found[place] = value

    spec = block_spec(transformer_config(config), config.model, backend, config.data.packing)
    for index, layer in enumerate(spec.layer_specs):
        collect(str(index), layer.submodules)
        assert layer.submodules.sharded_state_dict_keys_map == {}
        if layer.submodules.mlp.func is ModalityAwareMoELayer:
            assert layer.submodules.mlp.keywords["submodules"].router.func is ModalityAwareRouter
    return {
        **{place: module for place, module in found.items() if module not in (IdentityOp, None)},
        "norm": spec.layer_norm,
    }


@pytest.mark.parametrize("attention", ATTENTION)
def test_every_norm_linear_layer_and_attention_is_the_backends(attention):
    config = tiny_config(**ATTENTION[attention])
    engine_modules, portable = modules_of(config, "transformer_engine"), modules_of(config, "portable")
    assert engine_modules.keys() == portable.keys() and len(portable) > 20
    assert all(module in ENGINE for module in engine_modules.values())
    # One for one: what one backend cuts by columns the other does, too.
    kinds = (RMSNorm, PortableCoreAttention, ColumnParallelLinear, RowParallelLinear, Linear)
    for place, module in portable.items():
        assert ENGINE[kinds.index(module)] is engine_modules[place], place


LARGE_HEADS = {
    "mla": {"model__attention__qk_head_dim": 128, "model__attention__qk_pos_emb_head_dim": 64},
    "gqa": {**ATTENTION["gqa"], "model__attention__kv_channels": 256},
}


@pytest.mark.parametrize("heads", LARGE_HEADS)
def test_torch_attends_to_packed_documents_with_large_heads(heads):
    """Whose gradients Transformer Engine gets wrong."""

    def attention(**overrides: object) -> object:
        config = tiny_config(**overrides, training__micro_batch_size=1)
        return modules_of(config, "transformer_engine")["0.self_attention.core_attention"]

    assert attention(**LARGE_HEADS[heads], data__packing=True) is PortableCoreAttention
    assert attention(**LARGE_HEADS[heads]) is transformer_engine.TEDotProductAttention
    assert attention(**ATTENTION[heads], data__packing=True) is transformer_engine.TEDotProductAttention


def test_auto_takes_the_engine_where_there_is_one(engine):
    assert platform.model_backend("auto") == "transformer_engine"
    assert platform.model_backend("portable") == "portable"
    assert {choice.chosen for choice in platform.part_choices()} >= {"Transformer Engine"}
    assert not any(choice.loses for choice in platform.part_choices())


@pytest.mark.parametrize(
    ("overrides", "is_fused"),
    [
        ({}, True),
        ({"model__transformer_impl": "portable"}, False),
        ({"model__moe__moe_token_dispatcher_type": "allgather"}, False),
        ({"model__moe__moe_permute_fusion": "false"}, False),
        ({"model__moe__moe_permute_fusion": "true", "model__transformer_impl": "portable"}, True),
    ],
)
def test_the_engine_permutes_tokens_where_it_computes_the_rest(engine, overrides, is_fused):
    assert transformer_config(tiny_config(**overrides)).moe_permute_fusion == is_fused


def test_without_one_tokens_are_permuted_by_torch():
    assert not transformer_config(tiny_config()).moe_permute_fusion


def test_without_one_auto_is_portable_and_asking_for_it_is_an_error():
    assert platform.model_backend("auto") == "portable"
    with pytest.raises(
        ConfigError, match=r"model.transformer_impl='transformer_engine': needs Transformer Engine.*pip install"
    ):
        check_libraries(tiny_config(model__transformer_impl="transformer_engine"))
    assert all(choice.reason for choice in platform.part_choices())


def test_a_gpu_without_the_engine_says_what_that_costs(engine, monkeypatch):
    monkeypatch.setattr(transformer_engine, "HAVE_TE", False)
    by_part = {choice.part: choice for choice in platform.part_choices()}
    assert by_part["FP8"].chosen == "torch scaled_mm" and "blockwise" in by_part["FP8"].loses
    assert by_part["attention, norms, linear layers"].loses


FP8 = {
    "precision__fp8": "hybrid",
    "precision__dtype": "bf16",
    "model__hidden_size": 64,
    "model__moe__moe_ffn_hidden_size": 64,
    "model__attention__qk_pos_emb_head_dim": 16,
    "model__attention__v_head_dim": 16,
}


def test_fp8_is_the_engines_where_the_modules_are(engine):
    config = tiny_config(**FP8, model__moe__expert_backend="transformer_engine", precision__num_layers_at_end_in_bf16=2)
    check_libraries(config)
    options = _transformer_engine_fp8(config)
    assert (options["fp8"], options["fp8_recipe"], options["first_last_layers_bf16"]) == ("hybrid", "tensorwise", True)
    assert (options["num_layers_at_start_in_bf16"], options["num_layers_at_end_in_bf16"]) == (1, 2)


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ({}, "needs model.moe.expert_backend=transformer_engine, not 'grouped'"),
        ({"precision__fp8_backend": "torch"}, "needs model.transformer_impl=portable"),
        ({"precision__fp8_backend": "emulate"}, "needs model.transformer_impl=portable"),
        (
            {"model__moe__expert_backend": "transformer_engine", "precision__fp8_recipe": "delayed"},
            "fp8_recipe='delayed' in Transformer Engine cannot keep layers in bf16",
        ),
        (
            {"model__transformer_impl": "portable", "precision__fp8_recipe": "blockwise"},
            "torch's kernels support fp8_recipe=delayed and tensorwise, not 'blockwise'",
        ),
        (
            {"model__transformer_impl": "portable", "precision__fp8_backend": "transformer_engine"},
            "model.transformer_impl=transformer_e",
        ),
    ],
)
def test_combinations_that_nobody_computes_are_refused(engine, overrides, match):
    with pytest.raises(ConfigError, match=match):
        check_libraries(tiny_config(**{**FP8, **overrides}))
