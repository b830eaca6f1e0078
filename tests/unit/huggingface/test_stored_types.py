"""What ``config.json`` of an export says of its weights, their type and a tied head, is what is stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_most.conversion import ImportOptions, export_model, import_model
from megatron_most.errors import CheckpointError
from megatron_most.huggingface import MoSTForConditionalGeneration
from tests.unit.conversion.models import deepseek
from tests.unit.huggingface.exports import config_of, exported, write_native
from tests.unit.huggingface.test_export import assert_same_weights


def said_types(folder: Path) -> set[str]:
    """What ``config.json`` says of the weights' type, by either name."""
    config = json.loads((folder / "config.json").read_text())
    return {config["dtype"], config.get("torch_dtype", config["dtype"])}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_type_of_a_base_is_that_of_the_export_and_its_values_survive(dtype, tmp_path):
    deepseek(tmp_path / "base", dtype)
    options = ImportOptions("expand", "frame:2x16", verify=False)
    checkpoint = import_model(tmp_path / "base", tmp_path / "native", options)
    folder = export_model(checkpoint, tmp_path / "hf", "hf", verify=False)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {dtype}
    assert said_types(folder) == {str(dtype).removeprefix("torch.")}
    loaded = MoSTForConditionalGeneration.from_pretrained(folder, dtype="auto")
    assert {weight.dtype for weight in loaded.parameters()} == {dtype}
    loaded.to(torch.float32).save_pretrained(tmp_path / "wider")
    assert said_types(tmp_path / "wider") == {"float32"}
    assert_same_weights(checkpoint, import_model(folder, tmp_path / "again", ImportOptions(verify=False)))


def test_the_type_that_is_asked_for_is_said(tmp_path):
    folder = export_model(exported("frame")[0], tmp_path / "hf", "hf", "bf16", verify=False)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert said_types(folder) == {"bfloat16"}


def test_biases_of_experts_are_fp32_beside_weights_of_the_type_that_is_said(tmp_path):
    checkpoint = write_native(config_of("bias", precision__dtype="bf16"), tmp_path / "native")
    assert said_types(export_model(checkpoint, tmp_path / "hf", "hf", verify=False)) == {"bfloat16"}


@pytest.mark.parametrize("holds", ["another head", "a head, and says it is tied"])
def test_a_tied_model_with_a_head_of_its_own_is_refused(holds, tmp_path):
    tied = holds == "another head"
    folder = tmp_path / "hf"
    shutil.copytree(exported("qwen" if tied else "gqa")[1], folder)
    if tied:
        tensors = load_file(folder / "model.safetensors")
        head = tensors["model.embed_tokens.weight"].flip(0)
        save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
        message = "tie_word_embeddings=true, but model.safetensors holds lm_head.weight, which differs from"
    else:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, "tie_word_embeddings": True}))
        message = "tie_word_embeddings=true, but|tie_word_embeddings=True: run_config says False"
    with pytest.raises(CheckpointError, match=message):
        import_model(folder, tmp_path / "again", ImportOptions())
    assert not (tmp_path / "again").exists()
