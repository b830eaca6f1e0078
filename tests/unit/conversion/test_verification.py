"""Both models are run layer by layer: what is said of them is what whole models say, and a wrong weight is found."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from megatron_most import parallel
from megatron_most.checkpointing import read_metadata
from megatron_most.checkpointing.directory import STATE
from megatron_most.checkpointing.regions import Region
from megatron_most.config import ParallelConfig
from megatron_most.conversion import import_model
from megatron_most.conversion.architectures import read_foreign
from megatron_most.conversion.comparison import Comparison
from megatron_most.conversion.export_plan import stored_config
from megatron_most.conversion.foreign_layers import ForeignLayers, rows_of
from megatron_most.conversion.hugging_face import HuggingFaceModel
from megatron_most.conversion.import_plan import ImportPlan
from megatron_most.conversion.verification import compare, random_tokens
from megatron_most.errors import CheckpointError
from megatron_most.extras import MissingExtra
from tests.unit.conversion.models import DEEPSEEK_SHAPES, VOCAB, deepseek, llama
from tests.unit.conversion.test_round_trips import native_logits, options


def comparison(hf: Path, checkpoint: Path) -> tuple[Comparison, torch.Tensor]:
    source = HuggingFaceModel(hf)
    _, foreign = read_foreign(source.config, "test")
    config = stored_config(checkpoint, read_metadata(checkpoint))
    tokens = random_tokens(config, foreign)
    parallel.initialize(ParallelConfig(), seed=0)
    try:
        return compare(source, foreign, config, checkpoint / STATE, tokens), tokens
    finally:
        parallel.destroy()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["deepseek", "llama", "tied llama"])
def test_layers_say_what_whole_models_say(tmp_path, kind, monkeypatch):
    """With a partition, whose logits differ enough for the differences to be compared. Ids come in several blocks."""
    monkeypatch.setattr("megatron_most.conversion.verification.MAX_ELEMENTS", 32 * 40)
    if kind == "deepseek":
        model, mode = deepseek(tmp_path / "hf", num_hidden_layers=4), "partition"
    else:
        model, mode = llama(tmp_path / "hf", tie_word_embeddings=kind == "tied llama"), "upcycle"
    checkpoint = import_model(tmp_path / "hf", tmp_path / "native", options(mode, verify=False))
    found, tokens = comparison(tmp_path / "hf", checkpoint)
    theirs, mine = model.eval()(tokens).logits, native_logits(checkpoint, tokens)[..., :VOCAB]
    assert found.tokens == tokens.numel() == 256 and len(found.layers) == model.config.num_hidden_layers
    assert found.largest_logit == pytest.approx(theirs.abs().max().item(), rel=1e-5)
    for perplexity, logits in zip(found.perplexities, (theirs, mine), strict=True):
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert perplexity == pytest.approx(loss.exp().item(), rel=1e-5)
    if mode == "partition":
        gap = (theirs - mine).abs()
        assert found.max_difference == pytest.approx(gap.max().item(), rel=1e-3)
        assert found.mean_difference == pytest.approx(gap.mean().item(), rel=1e-3)
        same = (theirs.argmax(dim=-1) == mine.argmax(dim=-1)).float().mean().item()
        assert found.top1_agreement == pytest.approx(same) and same < 1
        assert found.layers[0] < 1e-5 < 1e-3 < min(found.layers[1:])
    else:
        assert found.relative_difference < 1e-5 and found.top1_agreement == 1


def spoil(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """Let imports write other values of a tensor than those of the base; also where they read it back."""
    produce = ImportPlan.produce

    def spoilt(plan: ImportPlan, region: Region) -> torch.Tensor:
        tensor = produce(plan, region)
        return tensor.flip(-1) if region.key == key else tensor

    monkeypatch.setattr(ImportPlan, "produce", spoilt)


WRONG = {
    "decoder.layers.0.mlp.linear_fc2.weight": "from layer 0 on",
    "decoder.layers.1.self_attention.linear_kv_up_proj.weight": "from layer 1 on",
    "decoder.layers.1.mlp.router.weight": "from layer 1 on",
    "decoder.layers.2.mlp.experts.experts.linear_fc1.weight": "from layer 2 on",
    "decoder.layers.2.pre_mlp_layernorm.weight": "from layer 2 on",
    "decoder.final_layernorm.weight": "in the head",
    "output_layer.weight": "in the head",
}


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_weight_is_found_and_its_layer_named(tmp_path, key, monkeypatch):
    deepseek(tmp_path / "hf")
    spoil(monkeypatch, key)
    with pytest.raises(CheckpointError, match=f"the models differ {WRONG[key]}: .*; the tolerance is 1.0e-04") as error:
        import_model(tmp_path / "hf", tmp_path / "native", options("expand"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "native").exists()
    import_model(tmp_path / "hf", tmp_path / "native", dataclasses.replace(options("expand"), verify=False))


@pytest.mark.parametrize("shape", ["plain", "group_limited"])
def test_a_partition_is_the_base_with_the_experts_of_text(tmp_path, shape, monkeypatch):
    """Its logits differ from the base's; a wrong weight is found nevertheless."""
    deepseek(tmp_path / "hf", **DEEPSEEK_SHAPES[shape])
    groups = (
        "model.moe.groups=[{modality: text, experts: [5, 0, 3], moe_router_topk: 2},"
        " {modality: audio, experts: [1, 2, 4], moe_router_topk: 2}]"
    )
    wanted = options("partition", *([groups] if shape == "plain" else []))
    checkpoint = import_model(tmp_path / "hf", tmp_path / "native", wanted)
    logits = json.loads((checkpoint / "conversion.json").read_text())["checks"]["logits"]
    assert logits["max_difference"] > 1e-2 * logits["largest_logit"]
    alone = logits["experts_of_text_alone"]
    assert alone["max_difference"] < 1e-5 * alone["largest_logit"] and alone["top1_agreement"] == 1
    assert "this conversion changes the logits: logits of 256 tokens" in logits["said"]

    spoil(monkeypatch, "decoder.layers.2.mlp.router.weight")
    with pytest.raises(CheckpointError, match="hf, with the experts of text alone: the models differ from layer 2 on"):
        import_model(tmp_path / "hf", tmp_path / "other", wanted)


def test_a_layer_without_weights_is_an_error_not_a_random_layer(tmp_path):
    deepseek(tmp_path / "hf")
    source = HuggingFaceModel(tmp_path / "hf")
    del source.tensors["model.layers.1.self_attn.o_proj.weight"]
    _, foreign = read_foreign(source.config, "test")
    tokens = torch.arange(8).view(2, 4)
    layers = ForeignLayers(source, foreign, tokens, torch.zeros_like(tokens))
    hidden, _ = layers.run(0, layers.embed())
    with pytest.raises(CheckpointError, match="hf: layer 1: transformers finds no weights for .*o_proj"):
        layers.run(1, hidden)


def test_only_a_name_turns_it_off(tmp_path, monkeypatch, capsys):
    deepseek(tmp_path / "hf")
    find_spec = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "transformers" else find_spec(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    with pytest.raises(MissingExtra, match="needs transformers, which is not installed"):
        import_model(tmp_path / "hf", tmp_path / "native", options("expand"))
    assert not (tmp_path / "native").exists()
    import_model(tmp_path / "hf", tmp_path / "native", options("expand", verify=False))
    assert "checked logits: not compared (--no-verify)" in capsys.readouterr().out


def test_rows_of_a_table_are_read_in_blocks():
    table = torch.arange(40.0).view(20, 2)
    tokens = torch.tensor([[0, 19, 7], [7, 1, 12]])
    read: list[tuple[int, int]] = []

    def block(start: int, rows: int) -> torch.Tensor:
        read.append((start, rows))
        return table[start : start + rows]

    assert torch.equal(rows_of(tokens, 20, block, at_once=5), table[tokens])
    assert read == [(0, 5), (5, 5), (10, 5), (15, 5)]
