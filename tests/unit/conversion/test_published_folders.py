"""Folders as they are found: tied heads, half precision, left-over indexes, implied fields, several stop ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_most.checkpointing import read_metadata
from megatron_most.conversion import export_model, import_model
from megatron_most.conversion.import_plan import plan_import
from megatron_most.errors import CheckpointError, ConfigError
from tests.unit.conversion.models import DEEPSEEK_SHAPES, deepseek, llama
from tests.unit.conversion.test_broken_input import edit_json
from tests.unit.conversion.test_round_trips import assert_same_files, options

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
UPCYCLE = options("upcycle")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def edit_tensors(folder: Path, **changes: torch.Tensor) -> None:
    save_file({**load_file(folder / WEIGHTS), **changes}, folder / WEIGHTS)


# Tied heads


@pytest.mark.parametrize(
    "head", [lambda embedding: embedding + (torch.arange(90) == 89)[:, None], lambda embedding: embedding[:80].clone()]
)
@pytest.mark.parametrize(("make", "mode"), [(llama, "upcycle"), (deepseek, "expand")])
def test_a_head_that_is_not_the_embedding_it_is_said_to_be_is_refused(tmp_path, make, mode, head):
    make(tmp_path / "hf")
    edit_json(tmp_path / "hf" / "config.json", tie_word_embeddings=True)
    edit_tensors(tmp_path / "hf", **{HEAD: head(load_file(tmp_path / "hf" / WEIGHTS)[EMBEDDING])})
    match = "config.json: tie_word_embeddings=true, but model.safetensors holds lm_head.weight, which differs from"
    with pytest.raises(CheckpointError, match=match) as caught:
        plan_import(tmp_path / "hf", options(mode))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_head_that_equals_the_embedding_may_be_there(tmp_path, dtype):
    llama(tmp_path / "hf", torch.bfloat16)
    edit_json(tmp_path / "hf" / "config.json", tie_word_embeddings=True)
    edit_tensors(tmp_path / "hf", **{HEAD: load_file(tmp_path / "hf" / WEIGHTS)[EMBEDDING].to(dtype)})
    assert plan_import(tmp_path / "hf", UPCYCLE).unused == {HEAD: f"tied to {EMBEDDING}"}


def test_a_flag_that_is_no_flag_is_refused(tmp_path):
    llama(tmp_path / "hf")
    edit_json(tmp_path / "hf" / "config.json", tie_word_embeddings="false")
    with pytest.raises(CheckpointError, match="tie_word_embeddings='false'"):
        plan_import(tmp_path / "hf", UPCYCLE)


# Element types


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_upcycled_model_comes_back_in_its_type_bit_for_bit(tmp_path, dtype):
    """Also numbers whose half is not an fp16 number."""
    llama(tmp_path / "hf", dtype)
    name = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(tmp_path / "hf", **{name: load_file(tmp_path / "hf" / WEIGHTS)[name] * 1e-5})
    export_model(import_model(tmp_path / "hf", tmp_path / "native", UPCYCLE), tmp_path / "back", "llama")
    assert_same_files(tmp_path / "hf", tmp_path / "back")
    assert read(tmp_path / "back" / "config.json")["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_a_half_precision_deepseek_comes_back_in_its_type(tmp_path):
    deepseek(tmp_path / "hf", torch.float16, **DEEPSEEK_SHAPES["plain"])
    export_model(
        import_model(tmp_path / "hf", tmp_path / "native", options("expand")), tmp_path / "back", "deepseek-v2"
    )
    assert_same_files(tmp_path / "hf", tmp_path / "back")
    assert read(tmp_path / "back" / "config.json")["torch_dtype"] == "float16"


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_the_type_that_is_said_holds_every_value(tmp_path, stored):
    llama(tmp_path / "hf", stored)
    name = "model.norm.weight"
    edit_tensors(tmp_path / "hf", **{name: load_file(tmp_path / "hf" / WEIGHTS)[name].float() + 1e-6})
    export_model(import_model(tmp_path / "hf", tmp_path / "native", UPCYCLE), tmp_path / "back", "llama")
    assert_same_files(tmp_path / "hf", tmp_path / "back")
    assert read(tmp_path / "back" / "config.json")["torch_dtype"] == "float32"


# Indexes


def shard(folder: Path, number: int, of: int) -> str:
    return f"model-{number:05d}-of-{of:05d}.safetensors"


def split(folder: Path, parts: int, index: bool = True) -> None:
    """Write the weights of ``model.safetensors`` again as ``parts`` files, with an index."""
    tensors = load_file(folder / WEIGHTS)
    weight_map = {name: shard(folder, place % parts + 1, parts) for place, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in weight_map if weight_map[name] == file}, folder / file)
    if index:
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("missing", [False, True])
def test_an_index_beside_a_whole_model_is_refused(tmp_path, missing):
    llama(tmp_path / "hf")
    split(tmp_path / "hf", 2)
    if missing:
        (tmp_path / "hf" / shard(tmp_path, 2, 2)).unlink()
    with pytest.raises(
        CheckpointError,
        match="index.json does not name model.safetensors; remove",
    ):
        plan_import(tmp_path / "hf", UPCYCLE)


def test_an_index_of_other_shards_is_refused(tmp_path):
    llama(tmp_path / "hf")
    split(tmp_path / "hf", 2)
    split(tmp_path / "hf", 3, index=False)
    (tmp_path / "hf" / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="index.json does not name model-00001-of-00003.safetensors; remove"):
        plan_import(tmp_path / "hf", UPCYCLE)


def test_a_whole_model_beside_shards_is_refused(tmp_path):
    llama(tmp_path / "hf")
    split(tmp_path / "hf", 2, index=False)
    with pytest.raises(CheckpointError, match="holds both model.safetensors and model-00001-of-00002.safetensors"):
        plan_import(tmp_path / "hf", UPCYCLE)


def test_a_stale_index_of_pickles_is_refused(tmp_path):
    llama(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / WEIGHTS)
    (tmp_path / "hf" / WEIGHTS).unlink()
    torch.save(tensors, tmp_path / "hf" / "pytorch_model.bin")
    torch.save(tensors, tmp_path / "hf" / "pytorch_model-00001-of-00001.bin")
    index = {"weight_map": dict.fromkeys(tensors, "pytorch_model-00001-of-00001.bin")}
    (tmp_path / "hf" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="pytorch_model.bin.index.json does not name pytorch_model.bin;"):
        plan_import(tmp_path / "hf", options("upcycle", allow_pickle=True))


def test_other_files_of_weights_do_not_matter_and_an_index_may_name_the_whole_model(tmp_path):
    llama(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / WEIGHTS)
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "model.fp16.safetensors"):
        save_file({"x": torch.ones(1)}, tmp_path / "hf" / name)
    (tmp_path / "hf" / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, WEIGHTS)}))
    assert plan_import(tmp_path / "hf", UPCYCLE).source.tensors.keys() == tensors.keys()


# Positions


@pytest.mark.parametrize(
    ("scaling", "others", "expected"),
    [
        ({"type": "yarn", "factor": 4.0}, {}, (64, 4.0)),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, {}, (16, 4.0)),
        ({"rope_type": "yarn", "factor": 4.0}, {"original_max_position_embeddings": 32}, (32, 4.0)),
        ({"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16}, {}, (16, 4.0)),
        ({"type": "yarn", "factor": 2.0}, {"max_position_embeddings": "absent"}, (2048, 2.0)),
        ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, {}, (64, 2.0)),
    ],
)
def test_missing_fields_of_scaled_positions_mean_what_transformers_takes(tmp_path, scaling, others, expected):
    """Import compares the logits with transformers'."""
    llama(tmp_path / "hf")
    changes = {"rope_parameters": "absent", "rope_theta": 100.0, "rope_scaling": scaling, **others}
    edit_json(tmp_path / "hf" / "config.json", **changes)
    checkpoint = import_model(tmp_path / "hf", tmp_path / "native", UPCYCLE)
    rope = read_metadata(checkpoint).config["model"]["attention"]["rope"]
    assert (rope["original_max_position_embeddings"], rope["rotary_scaling_factor"]) == expected
    assert read(checkpoint / "conversion.json")["checks"]["logits"]["max_difference"] < 1e-3


def test_yarn_of_a_deepseek_without_its_original_length(tmp_path):
    deepseek(tmp_path / "hf")
    scaling = {"type": "yarn", "factor": 4.0}
    edit_json(tmp_path / "hf" / "config.json", rope_parameters="absent", rope_theta=100.0, rope_scaling=scaling)
    checkpoint = import_model(tmp_path / "hf", tmp_path / "native", options("expand"))
    assert read_metadata(checkpoint).config["model"]["attention"]["rope"]["original_max_position_embeddings"] == 64
    assert read(checkpoint / "conversion.json")["checks"]["logits"]["max_difference"] < 1e-3


def test_positions_that_rotate_a_part_of_a_head_are_refused(tmp_path):
    llama(tmp_path / "hf")
    edit_json(tmp_path / "hf" / "config.json", partial_rotary_factor=0.5)
    with pytest.raises(CheckpointError, match="partial_rotary_factor=0.5"):
        plan_import(tmp_path / "hf", UPCYCLE)


# Stop ids


def round_trip(tmp_path: Path) -> Path:
    return export_model(import_model(tmp_path / "hf", tmp_path / "native", UPCYCLE), tmp_path / "back", "llama")


@pytest.mark.parametrize("eos", [7, [2, 7, 11]])
def test_a_generation_config_comes_back_as_it_was(tmp_path, eos):
    llama(tmp_path / "hf")
    text = json.dumps({"eos_token_id": eos, "pad_token_id": 0, "temperature": 0.6})
    (tmp_path / "hf" / "generation_config.json").write_text(text)
    back = round_trip(tmp_path)
    assert (back / "generation_config.json").read_text() == text
    config = read(back / "config.json")
    assert (config["eos_token_id"], config["pad_token_id"]) == (eos, 0)


def test_ids_of_the_configuration_alone_come_back(tmp_path):
    llama(tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").unlink()
    edit_json(tmp_path / "hf" / "config.json", eos_token_id=[2, 7], bos_token_id=1, pad_token_id=None)
    back = round_trip(tmp_path)
    expected = {"bos_token_id": 1, "eos_token_id": [2, 7]}
    assert read(back / "generation_config.json") == expected
    assert expected.items() <= read(back / "config.json").items() and "pad_token_id" not in read(back / "config.json")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_stop_id_that_is_no_id_is_refused_before_anything_is_written(tmp_path, file):
    llama(tmp_path / "hf")
    if file == "config.json":
        (tmp_path / "hf" / "generation_config.json").unlink()
    edit_json(tmp_path / "hf" / file, eos_token_id="</s>")
    with pytest.raises(ConfigError, match=f"hf/{file}: eos_token_id='</s>': must be an id or a list of ids"):
        import_model(tmp_path / "hf", tmp_path / "native", UPCYCLE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
