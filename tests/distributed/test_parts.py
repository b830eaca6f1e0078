"""Parts of the model that are frozen or learn at rates of their own, in one process and on many ranks."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_most import parallel
from megatron_most.checkpointing import load_checkpoint, save_checkpoint
from megatron_most.checkpointing.optimizer_state import OptimizerState
from megatron_most.checkpointing.state import _model_state
from megatron_most.config import RunConfig
from megatron_most.model import build_model
from megatron_most.training.optimizer import learning_rate
from megatron_most.training.parts import find_tables, named_parts, part_of
from megatron_most.training.train_step import build_train_state, train_step
from tests.distributed.harness import run_ranks
from tests.distributed.observe import (
    STEADY,
    Observation,
    assert_same,
    mixed_batches,
    observe,
    observe_each,
    own_share,
    starting_weights,
)
from tests.distributed.shards import Piece, assemble, fill_weights, local_pieces, pieces_of
from tests.distributed.tiny import TEXT_VOCAB, tiny_batch, tiny_config
from tests.unit.checkpointing.test_metadata import metadata_of

SCALES, RECOMPUTE, CLIP = "optimizer__lr_scales", "training__recompute", "optimizer__clip_grad"
TP, PP = "parallel__tensor_model_parallel_size", "parallel__pipeline_model_parallel_size"
EP, VPP = "parallel__expert_model_parallel_size", "parallel__virtual_pipeline_model_parallel_size"
ORDER, BACKEND, MICRO = "model__moe__expert_order", "model__moe__expert_backend", "training__micro_batch_size"
UNSHARDED = {"optimizer__use_distributed_optimizer": False, "optimizer__overlap_grad_reduce": False}

RATES = {
    "audio experts": "[{part: experts.audio, scale: 1}, {part: rest, scale: 0}]",
    "audio experts and heads": (
        "[{part: experts.audio, scale: 1}, {part: routers, scale: 3}, {part: heads, scale: 0.5},"
        " {part: rest, scale: 0}]"
    ),
    "heads": "[{part: heads, scale: 1}, {part: rest, scale: 0}]",
    "audio path": (
        "[{part: experts.audio, scale: 1}, {part: embeddings.audio, scale: 1}, {part: heads.audio, scale: 1},"
        " {part: rest, scale: 0}]"
    ),
    "rows at two rates": (
        "[{part: embeddings, scale: 0.25}, {part: embeddings.audio, scale: 2}, {part: heads, scale: 0.5},"
        " {part: heads.audio, scale: 0}]"
    ),
    "not text experts": "[{part: experts.text, scale: 0}, {part: shared_experts, scale: 0}, {part: norms, scale: 2}]",
}
TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")
BIASED = {"model__moe__moe_router_bias_update_rate": 1e-2}
"""A frozen router's expert biases are frozen too."""
# In contiguous order, a rank with text experts alone has frozen ones only.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "sequential-recompute": (1, {BACKEND: "sequential", RECOMPUTE: "full"}),
    "tp2": (2, {TP: 2, RECOMPUTE: "full"}),
    "pp2": (2, {PP: 2}),
    "pp2-vpp2-recompute": (2, {PP: 2, VPP: 2, RECOMPUTE: "moe"}),
    "dp2-unsharded": (2, UNSHARDED),
    "ep2-contiguous": (2, {EP: 2, ORDER: "contiguous"}),
    "dp2-ep2-contiguous": (4, {EP: 2, ORDER: "contiguous", MICRO: 1, RECOMPUTE: "moe"}),
    "dp2-ep2-sequential-unsharded": (4, {EP: 2, BACKEND: "sequential", MICRO: 1, **UNSHARDED}),
}
SPECS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "flat, sequential": {"vocab__layout": "flat", BACKEND: "sequential"},
    "q-lora, common experts": {"model__attention__q_lora_rank": 20, "model__moe__common__size": 4},
    "gqa, no dense layer": {
        "model__attention__type": "gqa",
        "model__attention__num_query_groups": 2,
        "model__first_k_dense_replace": 0,
    },
    "no shared experts, router weights per modality": {
        "model__moe__moe_shared_expert_intermediate_size": 0,
        "model__moe__router_weights": "per_modality",
        "model__moe__moe_router_score_function": "sigmoid",
        "model__moe__moe_router_bias_update_rate": 1e-3,
    },
}


def observe_rates(overrides: dict[str, Any]) -> list[Observation]:
    return [observe({**BIASED, **overrides, SCALES: scales}, 3) for scales in RATES.values()]


@functools.cache
def one_process() -> list[Observation]:
    [observations] = run_ranks(1, observe_rates, UNSHARDED)
    return observations


@functools.cache
def start() -> dict[str, torch.Tensor]:
    return assemble(run_ranks(1, starting_weights, BIASED))


def by_part(weights: dict[str, torch.Tensor]) -> dict[tuple[str, str], torch.Tensor]:
    """(part, name) -> tensor. Cut in two are the tensors of all experts of a layer, four of text and four of audio, and
    the tables of all ids."""
    parts = {}
    for name, tensor in weights.items():
        if ".mlp.experts." in name:
            text, audio = tensor.chunk(2, dim=tensor.dim() - 3)
            parts |= {("experts.text", name): text, ("experts.audio", name): audio}
        elif name in TABLES:
            part = part_of(name, [])
            parts |= {(part, name): tensor[:TEXT_VOCAB], (f"{part}.audio", name): tensor[TEXT_VOCAB:]}
        else:
            parts[part_of(name, []), name] = tensor
    return parts


def parts_of_model(overrides: dict[str, Any]) -> tuple[tuple[str, ...], set[str]]:
    config = tiny_config(**overrides)
    parallel.initialize(config.parallel, seed=1)
    model = build_model(config)
    of_tables = {part for table in find_tables(config, model) for part, _ in table.pieces}
    return config.part_names, of_tables | {part for _, _, part in named_parts(config, model)}


@pytest.mark.parametrize("spec", SPECS)
def test_every_weight_has_a_part_and_every_part_weights(spec):
    [(names, found)] = run_ranks(1, parts_of_model, SPECS[spec])
    assert found == set(names)


@pytest.mark.parametrize("rates", RATES)
def test_frozen_parts_stay_and_the_others_move(rates):
    config = tiny_config(**{SCALES: RATES[rates]})
    observation = one_process()[list(RATES).index(rates)]
    before = by_part(start())
    for (part, name), tensor in by_part(assemble([observation.weights[3]])).items():
        moved = not torch.equal(tensor, before[part, name])
        assert moved == (config.lr_scale(part) > 0), (part, name)
    assert set(observation.part_norms) == {part for part in config.part_names if config.lr_scale(part) > 0}
    assert all(observation.part_norms.values())
    gradients = by_part({k: v for k, v in assemble([observation.gradients]).items() if "expert_bias" not in k})
    for part, norm in observation.part_norms.items():
        square = sum(tensor.double().square().sum().item() for key, tensor in gradients.items() if key[0] == part)
        assert norm == pytest.approx(math.sqrt(square), rel=1e-6), part


def one_update(overrides: dict[str, Any]) -> list[Piece]:
    return observe({**overrides, CLIP: 0.0, "optimizer__weight_decay": 0.1}, 1).weights[1]


@pytest.mark.parametrize(
    ("rates", "parts"),
    [
        ("audio experts and heads", ("experts.audio", "routers", "heads", "heads.audio")),
        ("rows at two rates", ("embeddings", "embeddings.audio", "heads")),
    ],
)
def test_a_scaled_part_learns_as_at_that_rate(rates, parts):
    """Without clipping an update depends on the part's own gradient and rate alone."""
    scales = RATES[rates]
    config = tiny_config(**{SCALES: scales})
    [pieces] = run_ranks(1, one_update, {SCALES: scales})
    scaled = by_part(assemble([pieces]))
    for part in parts:
        rate = STEADY["optimizer__lr"] * config.lr_scale(part)
        [pieces] = run_ranks(1, one_update, {"optimizer__lr": rate})
        for key, tensor in by_part(assemble([pieces])).items():
            if key[0] == part:
                assert not torch.equal(tensor, by_part(start())[key])
                # Rows of a table are moved at another rate first, which rounds once more.
                torch.testing.assert_close(scaled[key], tensor, rtol=0, atol=3e-8 if key[1] in TABLES else 1e-8)


@pytest.mark.invariance
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(layout):
    world_size, overrides = LAYOUTS[layout]
    ranks = run_ranks(world_size, observe_rates, overrides)
    for observations, expected in zip(zip(*ranks, strict=True), one_process(), strict=True):
        assert_same(observations, expected)


@pytest.mark.parametrize("optimizer", [{}, UNSHARDED], ids=["sharded", "unsharded"])
def test_norms_of_parts_add_up_to_the_whole_in_bf16(optimizer):
    """Where the optimizer's parameters are fp32 copies, of which each must count once."""
    layouts = ({TP: 2, BACKEND: "sequential"}, {EP: 2, MICRO: 1})
    runs = [({**layout, **optimizer, "precision__dtype": "bf16"}, 1) for layout in layouts]
    for observations in run_ranks(2, observe_each, runs):
        for observation in observations:
            whole = math.sqrt(sum(norm**2 for norm in observation.part_norms.values()))
            assert whole == pytest.approx(observation.grad_norm, rel=1e-5) and whole > 0


def memory_and_rates(scales: str) -> tuple[int, int, int, int, list[tuple[float, dict[str, float]]]]:
    """Numbers: parameters that learn, in the model, gradient buffers and optimizer; the rates of a few steps."""
    config = tiny_config(
        **{**STEADY, **UNSHARDED, SCALES: scales, "optimizer__min_lr": 1e-3, "training__train_iters": 6}
    )
    parallel.initialize(config.parallel, seed=1)
    state = build_train_state(config)
    chunks, optimizer = state.model_chunks, state.optimizer
    learning = sum(p.numel() for _, p, part in named_parts(config, chunks) if config.lr_scale(part) > 0)
    with_buffer = sum(p.numel() for p in chunks[0].parameters() if hasattr(p, "main_grad"))
    rates = []
    for step in range(3):
        train_step(state, mixed_batches(config, step))
        rates.append(
            (learning_rate(state.scheduler), {g["part"]: g["lr"] for g in optimizer.param_groups if g["params"]})
        )
    in_optimizer = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    [member] = optimizer.chained_optimizers
    moments = sum(values[key].numel() for values in member.state.values() for key in ("exp_avg", "exp_avg_sq"))
    return learning, with_buffer, in_optimizer, moments, rates


def test_frozen_parts_take_no_memory_and_rates_keep_their_ratio():
    scales = RATES["audio experts and heads"]
    [(learning, with_buffer, in_optimizer, state, rates)] = run_ranks(1, memory_and_rates, scales)
    assert 0 < learning == with_buffer == in_optimizer
    assert state == 2 * learning
    config = tiny_config(**{SCALES: scales})
    bases = [base for base, _ in rates]
    assert bases == sorted(bases, reverse=True) and bases[-1] < bases[0] < STEADY["optimizer__lr"]
    for base, by_name in rates:
        assert by_name == pytest.approx({part: base * config.lr_scale(part) for part in by_name})
        assert set(by_name) == {"experts.audio", "routers", "heads", "heads.audio"}


MUON = {"optimizer__optimizer": "muon", "optimizer__use_distributed_optimizer": False}
FLAT_TP2 = {"vocab__layout": "flat", TP: 2, "parallel__expert_tensor_parallel_size": 1}
FROZEN_TEXT: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "flat": (1, {"vocab__layout": "flat"}),
    "frame-delay-dp2-bf16": (2, {"vocab__layout": "frame_delay", "precision__dtype": "bf16"}),
    "flat-tp2-bf16-unsharded": (2, {**FLAT_TP2, "precision__dtype": "bf16", **UNSHARDED}),
    "tp2": (2, {TP: 2}),
    "pp2": (2, {PP: 2, "vocab__layout": "flat"}),
    "ep2": (2, {EP: 2, ORDER: "contiguous"}),
    "muon": (2, MUON),
    "muon-flat-tp2": (2, {**MUON, **FLAT_TP2, "precision__dtype": "bf16"}),
}


def text_logits(config: RunConfig, chunks: list[torch.nn.Module]) -> torch.Tensor | None:
    """Of a batch without audio. None in a pipeline, where what follows from the weights is left out."""
    if config.parallel.pipeline_model_parallel_size > 1:
        return None
    batch = tiny_batch(config, seed=5, audio_share=0.0)
    [model] = chunks
    with torch.no_grad():
        logits, _ = model.eval()(batch.ids, batch.modality, batch.is_padding)
    model.train()
    return logits[..., : config.vocab.text_vocab_size].clone()


def train_audio_path(overrides: dict[str, Any]) -> list[tuple[str, bool, bool]]:
    """(name, whether it belongs to the audio path, whether it moved) of this rank's pieces; text logits are one."""
    options = {"optimizer__weight_decay": 0.1, MICRO: 1, **BIASED, **overrides, SCALES: RATES["audio path"]}
    config = tiny_config(**{**STEADY, **options})
    parallel.initialize(config.parallel, seed=1)
    state = build_train_state(config, fill_weights)
    before, logits = copies(state.model_chunks), text_logits(config, state.model_chunks)
    for step in range(3):
        train_step(state, own_share(mixed_batches(config, step)))
    found = []
    for (name, tensor), (_, after) in zip(before, copies(state.model_chunks), strict=True):
        part, cut = name.split("/")
        found.append((f"{part}/{cut}", part.endswith(".audio"), not torch.equal(tensor, after)))
    if logits is not None:
        found.append(("logits", False, not torch.equal(logits, text_logits(config, state.model_chunks))))
    return found


def copies(chunks: list[torch.nn.Module]) -> list[tuple[str, torch.Tensor]]:
    """``part/name`` and values of all pieces of this rank; of tables by row, of experts by expert."""
    found = []
    for name, _, offset, view in local_pieces(chunks):
        for index, values in enumerate(view.flatten(0, -3) if ".mlp.experts." in name else [view]):
            if ".mlp.experts." in name:
                found.append((f"experts.{'audio' if offset[0] + index >= 4 else 'text'}/{name}", values))
            elif name in TABLES:
                edge = min(max(TEXT_VOCAB - offset[0], 0), len(values))
                part = part_of(name, [])
                found += [(f"{part}/{name}", values[:edge]), (f"{part}.audio/{name}", values[edge:])]
            else:
                found.append((f"{part_of(name, [])}/{name}", values))
    return [(name, values.detach().clone()) for name, values in found if values.numel()]


@pytest.mark.parametrize("layout", FROZEN_TEXT)
def test_a_frozen_text_path_is_the_same_to_the_bit(layout):
    world_size, overrides = FROZEN_TEXT[layout]
    if "muon" in layout:
        pytest.importorskip("emerging_optimizers", reason="Muon's library is not installed")
    found = [entry for rank in run_ranks(world_size, train_audio_path, overrides) for entry in rank]
    assert {name for name, is_audio, moved in found if moved and not is_audio} == set()
    assert {name.split("/")[0] for name, _, moved in found if moved} == {
        "experts.audio",
        "embeddings.audio",
        "heads.audio",
    }
    moved = {name for name, is_audio, moved in found if moved}
    assert moved == {name for name, is_audio, _ in found if is_audio}


def config_for(overrides: dict[str, Any], scales: str) -> RunConfig:
    return tiny_config(**{**STEADY, MICRO: 1, **overrides, SCALES: scales})


def everything(chunks: list[torch.nn.Module], optimizer: Any) -> list[Piece]:
    """This rank's pieces of weights and optimizer state, as a checkpoint has them."""
    state = _model_state(chunks)
    state["optimizer"] = OptimizerState(optimizer, state, loading=False).tensors
    return [(key, shape, at, piece.detach().clone().float()) for key, shape, at, piece in pieces_of(state)]


def save(config: RunConfig, step: int, chunks: list[torch.nn.Module], optimizer: Any, run_dir: Path) -> None:
    metadata = dataclasses.replace(metadata_of(config, step=step), world_size=torch.distributed.get_world_size())
    save_checkpoint(run_dir, metadata, chunks, optimizer, keep_last=2)


def save_frozen(overrides: dict[str, Any], scales: str, run_dir: Path) -> list[Piece]:
    config = config_for(overrides, scales)
    parallel.initialize(config.parallel, seed=1)
    state = build_train_state(config, fill_weights)
    train_step(state, own_share(mixed_batches(config, 0)))
    save(config, 1, state.model_chunks, state.optimizer, run_dir)
    return everything(state.model_chunks, state.optimizer)


def resume(overrides: dict[str, Any], scales: str, run_dir: Path) -> list[Piece]:
    """What was loaded, after a step has shown that training goes on."""
    config = config_for(overrides, scales)
    parallel.initialize(config.parallel, seed=2)
    state = build_train_state(config)
    load_checkpoint(run_dir, config, state.model_chunks, state.optimizer)
    loaded = everything(state.model_chunks, state.optimizer)
    train_step(state, own_share(mixed_batches(config, 1)))
    save(config, 2, state.model_chunks, state.optimizer, run_dir)
    return loaded


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("readers", [("dp2", "ep2"), ("ep2", "plain")], ids=str)
def test_parts_are_frozen_and_thawed_between_runs(precision, readers, tmp_path):
    """Train audio experts and heads; then all but the text experts; then everything, each time in another layout."""
    layouts = {
        "ep2": (2, {EP: 2, ORDER: "contiguous"}),
        "dp2": (2, {}),
        "plain": (1, UNSHARDED),
    }
    common = {"precision__dtype": precision}
    stages = ["audio experts and heads", "not text experts"]
    writer = "plain" if "plain" not in readers else "dp2"
    world_size, overrides = layouts[writer]
    saved = assemble(run_ranks(world_size, save_frozen, overrides | common, RATES[stages[0]], tmp_path))
    moments = {key for key in saved if key.startswith("optimizer.state.exp_avg.")}
    assert moments and not any("attention" in key for key in moments)
    for reader, scales in zip(readers, [RATES[stages[1]], "[]"], strict=True):
        world_size, overrides = layouts[reader]
        loaded = assemble(run_ranks(world_size, resume, overrides | common, scales, tmp_path))
        if reader == readers[0]:
            assert_resumed(saved, loaded)


def assert_resumed(saved: dict[str, torch.Tensor], loaded: dict[str, torch.Tensor]) -> None:
    """All that was saved and is wanted is back; state that was not saved starts at zero, fp32 copies at the weights."""
    fresh = loaded.keys() - saved.keys()
    assert any("attention" in key for key in fresh)
    assert any(".mlp.experts." in key for key in loaded.keys() & saved.keys())
    for key in loaded.keys() & saved.keys():
        torch.testing.assert_close(loaded[key], saved[key], rtol=0, atol=0, msg=key)
    for key in fresh:
        kind, weight = key.removeprefix("optimizer.state.").split(".", 1)
        if kind == "fp32_param":
            torch.testing.assert_close(loaded[key], loaded[weight], rtol=0, atol=0, msg=key)
        else:
            assert not loaded[key].any(), key
