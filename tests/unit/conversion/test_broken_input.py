"""Broken and hostile folders: one line that names what is wrong, and no target."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_most.checkpointing.regions import Region
from megatron_most.conversion import ImportOptions, export_model, import_model
from megatron_most.conversion import importing as importing_module
from megatron_most.conversion.export_plan import plan_export
from megatron_most.errors import CheckpointError, MostError
from tests.unit.conversion.models import deepseek, llama
from tests.unit.conversion.test_round_trips import options

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "hf"
    deepseek(folder)
    return folder


@pytest.fixture(scope="module")
def exported(good, tmp_path_factory) -> Path:
    """An export with an extension."""
    folder = tmp_path_factory.mktemp("exported")
    return export_model(import_model(good, folder / "native", options("expand")), folder / "out", "deepseek-v2")


@pytest.fixture
def folder(good, tmp_path) -> Path:
    """A copy of a good model in two shards."""
    copy = tmp_path / "hf"
    copy.mkdir()
    tensors = load_file(good / WEIGHTS)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:30], "model-00002-of-00002.safetensors": names[30:]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, copy / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (copy / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (copy / "config.json").write_text((good / "config.json").read_text())
    return copy


def refused(folder: Path, match: str, kind: type[MostError] = CheckpointError, **others) -> None:
    target = folder.parent / "native"
    with pytest.raises(kind, match=match) as caught:
        import_model(folder, target, options("expand", **others))
    assert "\n" not in str(caught.value)
    assert not target.exists() and not (target.parent / ".tmp-native").exists()


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Apply ``change`` to the tensors of the first shard, whatever the index says."""
    file = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_json(path: Path, **changes: object) -> None:
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "absent"}))


def test_the_copy_is_good(folder):
    import_model(folder, folder.parent / "native", options("expand"))


def test_truncated_shard(folder):
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, "00002-of-00002.safetensors: unreadable")


def test_missing_shard(folder):
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "model-00002-of-00002.safetensors is missing")


@pytest.mark.parametrize("name, file, match", [
    ("model.norm.weight", "model-00001-of-00002.safetensors", "the index says .*00001.* which is in .*00002"),
    ("model.ghost.weight", "model-00001-of-00002.safetensors", "model.ghost.weight, which is in no file"),
    ("model.norm.weight", "../elsewhere.safetensors", "'../elsewhere.safetensors' is not a file name"),
    ("model.norm.weight", 7, "holds no weight_map"),
])  # fmt: skip
def test_lying_index(folder, name, file, match):
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, weight_map={**weight_map, name: file})
    refused(folder, match)


def test_tensor_that_the_index_does_not_name(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"extra.weight": torch.zeros(2)}))
    refused(folder, "tensor extra.weight is not in the index")


def test_tensor_in_two_shards(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32)}))
    refused(folder, "tensor model.norm.weight is in .*00001.* and in .*00002")


def test_tensor_without_a_place(good, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text((good / "config.json").read_text())
    tensors = load_file(good / WEIGHTS)
    save_file({**tensors, "model.layers.9.mlp.gate.weight": torch.zeros(6, 32)}, folder / WEIGHTS)
    refused(folder, "model.layers.9.mlp.gate.weight has no place in a deepseek-v2 model")


def test_rotary_frequencies_may_stand_there(good, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text((good / "config.json").read_text())
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**load_file(good / WEIGHTS), name: torch.ones(2)}, folder / WEIGHTS)
    checkpoint = import_model(folder, tmp_path / "native", options("expand"))
    left = json.loads((checkpoint / "conversion.json").read_text())["left_aside"]
    assert left == {name: "follows from the configuration"}


def test_missing_tensor(folder):
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    del weight_map[DOWN]
    edit_tensors(folder, lambda tensors: tensors.pop(DOWN))
    edit_json(folder / INDEX, weight_map=weight_map)
    refused(folder, f"tensor {DOWN} is missing")


def test_wrong_type(folder):
    edit_tensors(folder, lambda tensors: tensors.update({DOWN: tensors[DOWN].to(torch.int8)}))
    refused(folder, f"tensor {DOWN} is of type I8")


def test_types_that_cannot_be_one_tensor(folder):
    name = "model.layers.0.mlp.gate_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    refused(folder, "torch.float32, but others that go into decoder.layers.0.mlp.linear_fc1.weight are torch.bfloat16")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(folder, value):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[DOWN][3, 4] = value

    edit_tensors(folder, spoil)
    refused(folder, f"tensor {DOWN} holds values that are not finite")


@pytest.mark.parametrize("changes, match", [
    ({"intermediate_size": 44}, r"gate_proj.weight has shape \[48, 32\], the configuration says \[44, 32\]"),
    ({"vocab_size": 91}, r"has shape \[90, 32\], the configuration says \[91, 32\]"),
    ({"n_routed_experts": 7}, "mlp.gate.weight has shape|experts.6.gate_proj.weight is missing"),
    ({"num_hidden_layers": 2}, "layers.2.* has no place"),
    ({"num_hidden_layers": 4}, "layers.3.input_layernorm.weight is missing"),
    ({"hidden_size": "absent"}, "hidden_size is missing"),
    ({"hidden_size": "wide"}, "hidden_size='wide': must be a whole number"),
    ({"model_type": "mamba"}, "model_type='mamba': can be converted: deepseek_v2, MoST, llama"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu': only 'silu'"),
    ({"attention_bias": True}, "attention_bias=True"),
    ({"scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
    ({"norm_topk_prob": True}, "norm_topk_prob=True"),
    ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "type='longrope'"),
    ({"rope_parameters": 5}, "rope_scaling=5: must be a JSON object"),
    ({"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta=inf: must be a finite number"),
    ({"hidden_size": 10**6}, r"embed_tokens.weight has shape \[90, 32\], the configuration says \[90, 1000000\]"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: the files hold no more than 71"),
    ({"n_routed_experts": 10**9}, "n_routed_experts=1000000000: the files hold no more than 71"),
])  # fmt: skip
def test_configuration_that_contradicts_the_weights_or_cannot_be_converted(folder, changes, match):
    edit_json(folder / "config.json", **changes)
    refused(folder, match)


def test_unreadable_configuration(folder):
    (folder / "config.json").write_text("{")
    refused(folder, "config.json: not readable as JSON")


def test_nothing_there(tmp_path):
    refused(tmp_path / "hf", "no such directory")


def as_pickle(folder: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (folder / INDEX).unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def test_pickles_are_refused_unless_asked_for(folder):
    as_pickle(folder)
    refused(folder, "pytorch_model.bin: is a pickle")
    import_model(folder, folder.parent / "native", options("expand", allow_pickle=True))


class _Harmful:
    def __reduce__(self):
        return print, ("code ran",)


def test_pickled_code_does_not_run(folder, capsys):
    as_pickle(folder)
    with open(folder / "pytorch_model.bin", "wb") as stream:
        pickle.dump({"model.norm.weight": _Harmful()}, stream)
    refused(folder, "pytorch_model.bin: unreadable as weights only", allow_pickle=True)
    assert "code ran" not in capsys.readouterr().out


def test_links_out_of_the_folder(folder, tmp_path):
    outside = tmp_path / "outside.safetensors"
    inside = folder / "model-00001-of-00002.safetensors"
    inside.rename(outside)
    inside.symlink_to(outside)
    refused(folder, "00001-of-00002.safetensors: links to .*outside.safetensors, outside the directory")


def test_a_tokenizer_that_is_a_link_out_of_the_folder_is_found_before_anything_is_written(folder, tmp_path):
    (tmp_path / "secret").write_text("{}")
    (folder / "special_tokens_map.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="special_tokens_map.json: links to .*secret, outside the directory"):
        importing_module._plan(folder, tmp_path / "native", options("expand"))


def test_links_of_a_hub_cache_are_followed(folder, tmp_path):
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    folder.rename(snapshot)
    for place, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(place))
        file.symlink_to(f"../../blobs/{place}")
    import_model(snapshot, tmp_path / "native", options("expand"))


def test_no_room(folder, monkeypatch):
    usage = importing_module.shutil.disk_usage(folder)
    monkeypatch.setattr(importing_module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(folder, "needs 0.0 GB, .* has only 0.0 GB free")


@pytest.fixture
def small_disk():
    """The system refuses to write files of more than 200 kB, as it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_disk_that_fills_up_during_import(folder, small_disk):
    refused(folder, "native: cannot be written: File too large")


def test_disk_that_fills_up_during_export(folder, request):
    checkpoint = import_model(folder, folder.parent / "native", options("expand"))
    request.getfixturevalue("small_disk")
    out = folder.parent / "out"
    with pytest.raises(CheckpointError, match="cannot be written: File too large"):
        export_model(checkpoint, out, "deepseek-v2")
    assert not out.exists() and not (out.parent / ".tmp-out").exists()


def test_target_that_is_there_is_left_alone(folder):
    target = folder.parent / "native"
    target.mkdir()
    (target / "precious").write_text("mine")
    with pytest.raises(CheckpointError, match="native: exists already"):
        import_model(folder, target, options("expand"))
    assert (target / "precious").read_text() == "mine"


def test_interrupted_conversion_leaves_nothing_that_looks_whole_and_can_be_repeated(folder, monkeypatch):
    target = folder.parent / "native"
    with monkeypatch.context() as patch:
        patch.setattr(importing_module, "_finish", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr("megatron_most.checkpointing.region_writer.shutil.rmtree", lambda *arguments, **options: None)
        with pytest.raises(KeyboardInterrupt):
            import_model(folder, target, options("expand"))
    assert not target.exists() and (target.parent / ".tmp-native").exists()
    import_model(folder, target, options("expand"))
    assert not (target.parent / ".tmp-native").exists()


def test_what_an_interrupted_export_left_is_not_in_the_next(folder):
    checkpoint, out = import_model(folder, folder.parent / "native", options("expand")), folder.parent / "out"
    (folder.parent / ".tmp-out").mkdir()
    (folder.parent / ".tmp-out" / "model-00001-of-00009.safetensors").write_text("half")
    export_model(checkpoint, out, "deepseek-v2")
    assert not (folder.parent / ".tmp-out").exists() and not list(out.glob("*-of-00009*"))


@pytest.mark.parametrize("change, match", [
    (lambda values: values.pop("ids"), "not the description of an extension"),
    (lambda values: values.update(format=9), "has format 9, this version reads 1"),
    (lambda values: values["experts"].pop(), "must list 12 for each MoE layer"),
    (lambda values: values["ids"].append([120, 0, 50]), r"ids \[120, 0, 50\] are outside"),
    (lambda values: values["ids"].append([0, 0, 5]), "row 0 is written twice"),
    (lambda values: values["tensors"]["output_layer.weight[90]"].update(offsets=[0, 0]), "row 0 is written twice"),
    (lambda values: values["tensors"].popitem(), "must be both in this file and in the safetensors files"),
    (lambda values: next(iter(values["tensors"].values())).update(key="ghost"), "is not a region of a tensor"),
])  # fmt: skip
def test_broken_extension(exported, tmp_path, change, match):
    exported = Path(shutil.copytree(exported, tmp_path / "exported"))
    values = json.loads((exported / "most_extension.json").read_text())
    change(values)
    (exported / "most_extension.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=match):
        import_model(exported, tmp_path / "again", ImportOptions())
    assert not (tmp_path / "again").exists()


def test_corrupt_checkpoint_is_not_exported(folder):
    checkpoint = import_model(folder, folder.parent / "native", options("expand"))
    file = checkpoint / "state" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="corrupt: the content of state/__0_0.distcp"):
        export_model(checkpoint, folder.parent / "out", "deepseek-v2")
    assert not (folder.parent / "out").exists()


def test_llama_whose_experts_have_parted_is_refused(tmp_path):
    llama(tmp_path / "hf")
    plan = plan_export(import_model(tmp_path / "hf", tmp_path / "native", options("upcycle")), "llama", None)
    read = plan.reader.read

    def trained(region: Region, target: torch.Tensor | None = None) -> torch.Tensor:
        moved = region.key.endswith("layers.0.mlp.experts.experts.linear_fc2.weight") and region.offsets[0] == 3
        return read(region, target) + 1 if moved else read(region, target)

    plan.reader.read = trained
    with pytest.raises(CheckpointError, match=r"llama has one model.layers.0.mlp.down_proj.weight, but"):
        plan.produce("model.layers.0.mlp.down_proj.weight")
