"""Files written one tensor at a time equal those of the library."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_most.checkpointing.regions import TensorForm
from megatron_most.conversion.safetensors_files import index_of, parse_size, plan_shards, write_file
from megatron_most.errors import ConfigError

TENSORS = {
    "a": torch.randn(3, 5),
    "b.weight": torch.randn(7).bfloat16(),
    "c": torch.randn(2, 3, 4).half(),
    "empty": torch.zeros(0, 4),
}
FORMS = {name: TensorForm(tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


def test_the_library_reads_what_is_written(tmp_path):
    write_file(tmp_path / "x.safetensors", FORMS, TENSORS.__getitem__, {"format": "pt"})
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_hold_every_tensor_once_within_their_size():
    forms = {str(place): TensorForm((size,), torch.float32) for place, size in enumerate([3, 3, 3, 30, 1, 2])}
    shards = plan_shards(forms, "model", max_size=28)
    assert list(shards.values()) == [["0", "1"], ["2"], ["3"], ["4", "5"]]
    assert list(shards) == [f"model-{place:05d}-of-00004.safetensors" for place in range(1, 5)]
    index = index_of(shards, forms)
    assert index["metadata"]["total_size"] == 4 * 42
    assert index["weight_map"]["3"] == "model-00003-of-00004.safetensors"
    assert plan_shards(forms, "model", 1000) == {"model.safetensors": list(forms)}


@pytest.mark.parametrize("text", ["5", "GB", "5 GiB", "-1GB", "0MB", "1.5GB"])
def test_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match="--max-shard-size="):
        parse_size(text)


def test_sizes():
    assert (parse_size("5GB"), parse_size("20kb")) == (5 * 10**9, 20_000)
