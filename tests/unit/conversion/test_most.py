"""The format of the published MoST models: its ids, its expert lists, its score rule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_most.checkpointing import read_metadata
from megatron_most.checkpointing.directory import STATE
from megatron_most.checkpointing.regions import StateReader
from megatron_most.conversion import ImportOptions, export_model, import_model
from tests.unit.conversion.models import VOCAB, deepseek
from tests.unit.conversion.test_round_trips import SEQUENTIAL, assert_same_files, native_logits

TEXT_IDS, UNITS = 60, 20
BEGIN, END = TEXT_IDS + UNITS, TEXT_IDS + UNITS + 1
LISTS = {"apart": ([0, 1, 2], [3, 4, 5]), "mixed": ([5, 0, 3], [1, 4, 2]), "common": ([0, 1, 2, 4], [3, 4, 5])}


def most(folder: Path, text: list[int], audio: list[int]) -> torch.nn.Module:
    """Write a model in MoST's format; the module returned is its DeepSeek-V2."""
    model = deepseek(folder, routed_scaling_factor=1.5)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "MoST",
        "use_modality_aware_routing": True,
        "text_expert_indices": text,
        "audio_expert_indices": audio,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return model


def published(*overrides: str) -> ImportOptions:
    overrides = (*SEQUENTIAL, f"vocab.text_vocab_size={TEXT_IDS}", *overrides)
    return ImportOptions(audio_vocab=f"flat:1x{UNITS}", overrides=overrides)


def native_ids(ids: torch.Tensor) -> torch.Tensor:
    """Here, begin and end of audio and the id of a hidden code come before the units."""
    place = torch.arange(END + 1)
    place[BEGIN], place[END] = TEXT_IDS, TEXT_IDS + 1
    place[TEXT_IDS:BEGIN] += 3
    return place[ids]


def reference_layer(mlp: torch.nn.Module, choices: tuple[list[int], list[int]], is_audio: torch.Tensor, top_k: int):
    """The published layer, a token at a time: softmax over all experts, the other group's scores zero, top-k."""

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        out = mlp.shared_experts(hidden)
        for row in range(hidden.shape[0]):
            for position in range(hidden.shape[1]):
                h = hidden[row, position]
                scores = (mlp.gate.weight @ h).softmax(dim=0)
                mine = choices[int(is_audio[row, position])]
                for expert in sorted(mine, key=lambda e: -scores[e])[:top_k]:
                    gate, up = (mlp.experts.gate_up_proj[expert] @ h).chunk(2)
                    down = mlp.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                    out[row, position] += scores[expert] * 1.5 * down
        return out

    return forward


@pytest.mark.parametrize("lists", LISTS)
def test_logits_follow_the_published_definition(tmp_path, lists):
    text, audio = LISTS[lists]
    model = most(tmp_path / "hf", text, audio)
    checkpoint = import_model(tmp_path / "hf", tmp_path / "native", published())
    ids = torch.randint(END + 1, (2, 24), generator=torch.Generator().manual_seed(1))
    for layer in model.model.layers[1:]:
        layer.mlp.forward = reference_layer(layer.mlp, (text, audio), ids >= TEXT_IDS, top_k=2)
    with torch.no_grad():
        expected = model(ids).logits[..., : END + 1]
    found = native_logits(checkpoint, native_ids(ids))[..., native_ids(torch.arange(END + 1))]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("lists", LISTS)
def test_import_then_export_is_the_identity_on_what_is_used(tmp_path, lists):
    most(tmp_path / "hf", *LISTS[lists])
    checkpoint = import_model(tmp_path / "hf", tmp_path / "native", published())
    export_model(checkpoint, tmp_path / "back", "most")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    ids = ("model.embed_tokens.weight", "lm_head.weight")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        found = second[name]
        # Padding ids of the source after the one that `frame` gets are not used.
        expected = tensor[: END + 2] if name in ids else tensor
        assert torch.equal(found, expected), name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert sorted(config["text_expert_indices"]) == sorted(LISTS[lists][0])
    assert sorted(config["audio_expert_indices"]) == sorted(LISTS[lists][1])
    assert config["model_type"] == "MoST" and config["use_modality_aware_routing"] is True


@pytest.mark.parametrize("layout", ["flat:1x20", "frame:2x16"])
def test_export_then_import_is_the_identity(tmp_path, layout):
    deepseek(tmp_path / "hf")
    wanted = ImportOptions("partition", layout, overrides=[*SEQUENTIAL, "model.moe.score_rule=all"])
    checkpoint = import_model(tmp_path / "hf", tmp_path / "native", wanted)
    export_model(checkpoint, tmp_path / "most", "most")
    again = import_model(tmp_path / "most", tmp_path / "again", ImportOptions())
    ids = torch.randint(VOCAB + 2, (2, 16), generator=torch.Generator().manual_seed(1))
    assert torch.equal(native_logits(checkpoint, ids), native_logits(again, ids))
    first, second = (StateReader(path / STATE) for path in (checkpoint, again))
    assert first.forms == second.forms and first.forms
    assert all(torch.equal(first.read_whole(key), second.read_whole(key)) for key in first.forms)
    assert read_metadata(checkpoint).config["model"] == read_metadata(again).config["model"]
    export_model(again, tmp_path / "once_more", "most")
    assert_same_files(tmp_path / "most", tmp_path / "once_more")
