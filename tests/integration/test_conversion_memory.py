"""Memory does not grow with the model, and conversion is not much slower than a copy of the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_most.checkpointing.regions import TensorForm
from megatron_most.conversion.architectures import read_foreign
from megatron_most.conversion.safetensors_files import index_of, plan_shards, write_file

ROOT = Path(__file__).parents[2]
MEGABYTE, GIGABYTE = 1 << 20, 1 << 30

LITE = {
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "torch_dtype": "bfloat16",
}
"""DeepSeek-V2-Lite's shape, without the number of layers."""
SMALL = LITE | {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 1408,
    "moe_intermediate_size": 176,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
"""An eighth of it in each direction; the vocabulary a twenty-fifth."""


def synthetic(folder: Path, shape: dict, num_layers: int) -> Path:
    """Random weights of a shape, written a tensor at a time; equal rows are cheaper to make and as large."""
    folder.mkdir()
    config = {**shape, "num_hidden_layers": num_layers}
    (folder / "config.json").write_text(json.dumps(config))
    forms = {name: TensorForm(size, torch.bfloat16) for name, size in foreign_shapes(config).items()}
    noise = torch.randn(1 << 22).bfloat16()

    def produce(name: str) -> torch.Tensor:
        size = torch.Size(forms[name].shape)
        return noise.repeat(-(-size.numel() // len(noise)))[: size.numel()].view(size)

    shards = plan_shards(forms, "model", 2 * 10**9)
    for file, names in shards.items():
        write_file(folder / file, {name: forms[name] for name in names}, produce, {"format": "pt"})
    index = index_of(shards, forms)
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def foreign_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published files."""
    read_foreign(config, "test")
    hidden, width, heads = config["hidden_size"], config["moe_intermediate_size"], config["num_attention_heads"]
    latent, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    query, value = config["qk_nope_head_dim"] + rope, config["v_head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}

    def mlp(name: str, width: int) -> None:
        shapes.update({f"{name}.{part}_proj.weight": (width, hidden) for part in ("gate", "up")})
        shapes[f"{name}.down_proj.weight"] = (hidden, width)

    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        shapes |= {
            f"{name}.input_layernorm.weight": (hidden,),
            f"{name}.self_attn.q_proj.weight": (heads * query, hidden),
            f"{name}.self_attn.kv_a_proj_with_mqa.weight": (latent + rope, hidden),
            f"{name}.self_attn.kv_a_layernorm.weight": (latent,),
            f"{name}.self_attn.kv_b_proj.weight": (heads * (query - rope + value), latent),
            f"{name}.self_attn.o_proj.weight": (hidden, heads * value),
            f"{name}.post_attention_layernorm.weight": (hidden,),
        }
        if layer < config["first_k_dense_replace"]:
            mlp(f"{name}.mlp", config["intermediate_size"])
            continue
        shapes[f"{name}.mlp.gate.weight"] = (config["n_routed_experts"], hidden)
        for expert in range(config["n_routed_experts"]):
            mlp(f"{name}.mlp.experts.{expert}", width)
        mlp(f"{name}.mlp.shared_experts", width * config["n_shared_experts"])
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (config["vocab_size"], hidden)}


def convert(kind: str, source: Path, out: Path) -> dict:
    """Convert in a process of its own; what it measured."""
    command = [
        sys.executable,
        str(ROOT / "tests" / "integration" / "conversion_memory.py"),
        kind,
        str(source),
        str(out),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    print(kind, source, done.stdout)
    return json.loads(done.stdout.splitlines()[-1])


def peaks(tmp_path: Path, shape: dict, layers: tuple[int, ...]) -> dict[str, list[int]]:
    """Peak of anonymous memory, above what the imports take, of both directions at each number of layers."""
    found: dict[str, list[int]] = {"import": [], "export": []}
    for num_layers in layers:
        hf, native, out = (tmp_path / f"{name}{num_layers}" for name in ("hf", "native", "out"))
        synthetic(hf, shape, num_layers)
        for kind, source, target in (("import", hf, native), ("export", native, out)):
            measured = convert(kind, source, target)
            found[kind].append(measured["peak"] - measured["before"])
        for folder in (hf, native, out):
            shutil.rmtree(folder)
    return found


@pytest.mark.timeout(600)  # four processes that import all of Megatron, the first ones on this machine to do so
def test_memory_stays_flat_as_layers_are_added(tmp_path):
    """A layer has 19 MB; six more of them would show."""
    found = peaks(tmp_path, SMALL, (8, 14))
    for kind, (few, many) in found.items():
        assert many < few + 24 * MEGABYTE, (kind, few, many)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_with_the_shapes_of_deepseek_v2_lite(tmp_path):
    """Layers have 1.2 GB each."""
    largest = 102400 * 2048 * 2
    found = peaks(tmp_path, LITE, (2, 4, 8))
    for kind, values in found.items():
        assert max(values) < 2 * GIGABYTE + largest, (kind, values)
        assert max(values) - min(values) < 256 * MEGABYTE, (kind, values)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_verification_needs_a_layer_of_each_model(tmp_path):
    """A layer of this shape has 152 MB in fp32, the tables of all ids 17 MB: six more layers would show."""
    wide = SMALL | {"hidden_size": 512, "moe_intermediate_size": 352, "intermediate_size": 2816}
    layer_bytes, found = 4 * 3 * 66 * 512 * 352, []
    for num_layers in (2, 4, 8):
        hf, native = tmp_path / f"hf{num_layers}", tmp_path / f"native{num_layers}"
        synthetic(hf, wide, num_layers)
        measured = convert("verified-import", hf, native)
        found.append(measured["peak"] - measured["before"])
        logits = json.loads((native / "conversion.json").read_text())["checks"]["logits"]
        assert len(logits["layers"]) == num_layers
        shutil.rmtree(hf)
        shutil.rmtree(native)
    assert max(found) - min(found) < 0.7 * layer_bytes, found
    assert max(found) < 4 * layer_bytes + 512 * MEGABYTE, found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_speed_against_a_copy_of_the_same_bytes(tmp_path):
    """Both end with the bytes on the disk, the import with its tensors checked; the source is in the page cache.

    Each turn copies twice: where the two copies differ much, the machine is too busy to say anything.
    """
    hf = synthetic(tmp_path / "hf", LITE, 4)
    ratios, controls = [], []
    for turn in range(3):
        seconds = {}
        order = ["copy", "import", "control"]
        for what in order if turn % 2 else reversed(order):
            out = tmp_path / what
            if what == "import":
                seconds[what] = convert("import", hf, out)["seconds"]
            else:
                began = time.perf_counter()
                copy_to_disk(hf, out)
                seconds[what] = time.perf_counter() - began
            shutil.rmtree(out)
        ratios.append((seconds["copy"] + seconds["control"]) / 2 / seconds["import"])
        controls.append(seconds["control"] / seconds["copy"])
    print("copy seconds / import seconds:", ratios, "copy / copy:", controls)
    if not all(0.8 <= control <= 1.25 for control in controls):
        pytest.skip(f"inconclusive: copies of the same bytes took {controls} times as long as each other")
    assert statistics.median(ratios) >= 0.5, ratios


def copy_to_disk(source: Path, out: Path) -> None:
    out.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, out / path.name)
        with open(out / path.name, "rb") as stream:
            os.fsync(stream.fileno())
