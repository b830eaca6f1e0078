"""What an export may choose: element types, how positions are described, the numbers of experts."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_most.checkpointing.directory import STATE
from megatron_most.checkpointing.regions import StateReader
from megatron_most.conversion import ImportOptions, export_model, import_model
from tests.unit.conversion.models import LLAMA3, YARN, deepseek, llama
from tests.unit.conversion.test_round_trips import options


@pytest.mark.parametrize("stored, wanted", [(torch.float32, "bf16"), (torch.bfloat16, "fp32")])
def test_another_type_is_the_same_numbers_rounded_and_comes_back(tmp_path, stored, wanted):
    deepseek(tmp_path / "hf", stored)
    checkpoint = import_model(tmp_path / "hf", tmp_path / "native", options("expand"))
    export_model(checkpoint, tmp_path / "out", "deepseek-v2", wanted)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[wanted]
    mine, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "out"))
    assert mine.keys() == theirs.keys() and mine
    assert all(torch.equal(tensor.to(dtype), theirs[name]) for name, tensor in mine.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")
    again = import_model(tmp_path / "out", tmp_path / "again", ImportOptions())
    first, second = (StateReader(path / STATE) for path in (checkpoint, again))
    for key in first.forms:
        assert torch.equal(first.read_whole(key).to(dtype), second.read_whole(key)), key


@pytest.mark.parametrize(
    "make, mode, name, factor", [(deepseek, "expand", "deepseek-v2", 4), (llama, "upcycle", "llama", 8)]
)
def test_stretched_positions_are_said_in_both_ways(tmp_path, make, mode, name, factor):
    """Some versions of transformers take ``factor``, others the quotient of the two numbers of positions."""
    make(tmp_path / "hf", rope_parameters=YARN if make is deepseek else LLAMA3)
    export_model(import_model(tmp_path / "hf", tmp_path / "native", options(mode)), tmp_path / "out", name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    rope = config["rope_scaling"]
    assert rope["factor"] == factor
    assert config["max_position_embeddings"] == factor * rope["original_max_position_embeddings"]
