"""Options that need a library which is not there are refused before anything is built."""

from __future__ import annotations

import pytest
import torch
from megatron.core.extensions import transformer_engine
from megatron.core.optimizer import emerging_optimizers
from megatron.core.transformer.moe import fused_a2a, token_dispatcher

from megatron_most import platform
from megatron_most.errors import ConfigError
from megatron_most.model import build_model, check_libraries
from megatron_most.model.transformer_config import transformer_config
from megatron_most.planning import describe_run
from megatron_most.training.muon import check_muon
from tests.distributed.tiny import tiny_config

EXPERTS_ON_TWO_RANKS = {"parallel__expert_model_parallel_size": 2}
MISSING = {
    "Transformer Engine": (transformer_engine, "HAVE_TE", {"model__moe__expert_backend": "transformer_engine"}),
    "DeepEP": (fused_a2a, "HAVE_DEEP_EP", {"model__moe__moe_token_dispatcher_type": "deepep"}),
    "HybridEP": (fused_a2a, "HAVE_HYBRIDEP", {"model__moe__moe_token_dispatcher_type": "hybridep"}),
}


@pytest.mark.parametrize("library", MISSING)
def test_a_missing_library_is_one_line_that_says_how_to_get_it(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, flag, overrides = MISSING[library]
    config = tiny_config(**EXPERTS_ON_TWO_RANKS, **overrides)
    monkeypatch.setattr(module, flag, False)
    [(field, value)] = ((field.replace("__", "."), value) for field, value in overrides.items())
    # No process group is there: building would fail otherwise if it got any further.
    for ask in (lambda: check_libraries(config), lambda: build_model(config), lambda: describe_run(config, 2)):
        with pytest.raises(ConfigError, match=f"{field}='{value}': needs {library}, which is not installed") as caught:
            ask()
        assert "\n" not in str(caught.value) and ("pip install" in str(caught.value) or "build" in str(caught.value))
    monkeypatch.setattr(module, flag, True)
    check_libraries(config)


def test_a_kernel_of_the_router_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(model__moe__moe_router_fusion=True)
    monkeypatch.setattr("megatron_most.platform.libraries.can_run_triton", lambda: False)
    with pytest.raises(ConfigError, match="model.moe.moe_router_fusion=True: needs Triton, .*; it needs a GPU"):
        check_libraries(config)


def test_the_default_asks_for_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "require_library", lambda *arguments: pytest.fail(str(arguments)))
    check_libraries(tiny_config())


@pytest.mark.parametrize("backend", ["deepep", "hybridep"])
def test_flex_dispatchers_are_handed_to_megatron(backend: str) -> None:
    megatron = transformer_config(tiny_config(**EXPERTS_ON_TWO_RANKS, model__moe__moe_token_dispatcher_type=backend))
    assert megatron.moe_token_dispatcher_type == "flex"
    assert megatron.moe_flex_dispatcher_backend == backend


@pytest.mark.parametrize(("seq_length", "is_filled"), [(128, False), (96, True)])
def test_hybridep_fills_up_only_what_is_no_whole_chunk(seq_length: int, is_filled: bool) -> None:
    config = tiny_config(
        **EXPERTS_ON_TWO_RANKS,
        model__moe__moe_token_dispatcher_type="hybridep",
        data__seq_length=seq_length,
        parallel__tensor_model_parallel_size=2,
    )
    assert config.positions_per_rank == seq_length * config.training.micro_batch_size // 2
    assert transformer_config(config).moe_hybridep_pad_uneven_dispatch_inputs == is_filled


def test_muon_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(optimizer__optimizer="muon", optimizer__use_distributed_optimizer=False)
    monkeypatch.setattr(emerging_optimizers, "HAVE_EMERGING_OPTIMIZERS", False)
    for ask in (lambda: check_muon(config), lambda: describe_run(config, 1)):
        with pytest.raises(ConfigError, match="optimizer.optimizer='muon': needs emerging_optimizers") as caught:
            ask()
        assert "\n" not in str(caught.value) and "pip install -c constraints.txt '.[muon]'" in str(caught.value)
    # A model that was trained with it is built without it.
    check_libraries(config)
    monkeypatch.setattr(emerging_optimizers, "HAVE_EMERGING_OPTIMIZERS", True)
    check_muon(config)


def test_deepep_is_told_which_places_of_a_token_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fused_dispatch", "set_deepep_num_sms"):
        monkeypatch.setattr(token_dispatcher, name, lambda *arguments: None)
    megatron = transformer_config(tiny_config(**EXPERTS_ON_TWO_RANKS, model__moe__moe_token_dispatcher_type="deepep"))
    manager = token_dispatcher._DeepepManager(
        group=None, num_local_experts=4, router_topk=2, num_experts=8, config=megatron
    )
    # Two experts; one, as for a modality with a smaller top-k; none, as for padding.
    probs = torch.tensor([[0, 0.6, 0, 0, 0.2, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0.5], [0] * 8])
    manager.setup_metadata(probs > 0, probs)
    assert manager.token_indices.tolist() == [[1, 4], [7, -1], [-1, -1]]
