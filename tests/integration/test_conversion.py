"""Conversion together with training's layouts, torchrun and the commands."""

from __future__ import annotations

import dataclasses
import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_most import parallel
from megatron_most.checkpointing import CheckpointMetadata, load_model_weights, read_metadata, save_checkpoint
from megatron_most.checkpointing.directory import STATE
from megatron_most.checkpointing.regions import StateReader
from megatron_most.commands.convert import verify_command
from megatron_most.config import load_config
from megatron_most.conversion import ImportOptions, describe, export_model, import_model
from megatron_most.conversion.export_plan import plan_export
from megatron_most.conversion.import_plan import ImportPlan
from megatron_most.errors import CheckpointError, ConfigError
from megatron_most.model import build_model
from megatron_most.training.optimizer import build_optimizer, wrap_model
from tests.distributed.harness import run_ranks
from tests.integration.test_commands import ROOT, run
from tests.integration.tiny_run import write_dataset
from tests.unit.conversion.models import BASES, deepseek, fresh_copy, llama, write_base
from tests.unit.conversion.test_round_trips import assert_same_files, assert_same_logits, tokens

EXPAND = ImportOptions(experts="expand", audio_vocab="frame:2x16")
SIZES = {"num_hidden_layers": 4, "n_routed_experts": 4}
SPLIT = [
    "parallel.tensor_model_parallel_size=2",
    "parallel.pipeline_model_parallel_size=2",
    "parallel.expert_model_parallel_size=2",
    "parallel.expert_tensor_parallel_size=1",
]


def in_one_process(function, *arguments):
    """Conversion opens process groups, and ranks cannot be forked from a process that has any."""
    return run_ranks(1, function, *arguments)[0]


def load_and_save(imported: Path, checkpoint: Path, run_dir: Path, overrides: list[str]) -> None:
    """What training of no step does, with the configuration of an import: load weights in a layout, save them."""
    config = load_config(imported / "config.yaml", [*overrides, f"run_dir={run_dir}"])
    parallel.initialize(config.parallel, config.seed)
    chunks = build_model(config)
    load_model_weights(checkpoint, config, chunks)
    optimizer = build_optimizer(config, wrap_model(config, chunks))
    for part in optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)
    before = read_metadata(checkpoint)
    values = {**before.to_dict(), "config": dataclasses.asdict(config)}
    values["world_size"] = torch.distributed.get_world_size()
    metadata = CheckpointMetadata.from_dict(values)
    save_checkpoint(run_dir, metadata, chunks, optimizer, keep_last=1)


@pytest.mark.parametrize("kind", ["deepseek-v2", "llama"])
def test_weights_survive_another_layout_bit_for_bit(tmp_path, kind):
    if kind == "llama":
        llama(tmp_path / "hf", num_hidden_layers=4)
        options = ImportOptions(experts="upcycle", audio_vocab="frame:2x16")
    else:
        deepseek(tmp_path / "hf", q_lora_rank=12, **SIZES)
        options = EXPAND
    checkpoint = in_one_process(import_model, tmp_path / "hf", tmp_path / "native", options)
    run_ranks(4, load_and_save, checkpoint, checkpoint, tmp_path / "split", SPLIT)
    run_ranks(1, load_and_save, checkpoint, tmp_path / "split", tmp_path / "joined", [])
    for name in ("split", "joined"):
        in_one_process(export_model, tmp_path / name, tmp_path / f"out-{name}", kind)
        assert_same_files(tmp_path / "hf", tmp_path / f"out-{name}")
    found = fresh_copy(tmp_path / "out-joined")(tokens()).logits
    assert_same_logits(found, fresh_copy(tmp_path / "hf"), tokens())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moonlight", "qwen3-moe", "qwen2-moe", "olmoe", "smollm2"])
def test_weights_of_a_base_survive_another_layout_bit_for_bit(tmp_path, name):
    """A norm over all heads and biases are split, a tied table is on two stages, expert biases on every rank."""
    sizes = {"num_hidden_layers": 4, "num_key_value_heads": 4 if name in ("moonlight", "olmoe") else 2}
    write_base(name, tmp_path / "hf", **sizes)
    mode = "upcycle" if name == "smollm2" else "expand"
    options = ImportOptions(experts=mode, audio_vocab="frame:2x16")
    checkpoint = in_one_process(import_model, tmp_path / "hf", tmp_path / "native", options)
    run_ranks(4, load_and_save, checkpoint, checkpoint, tmp_path / "split", SPLIT)
    in_one_process(export_model, tmp_path / "split", tmp_path / "out", BASES[name][0])
    assert_same_files(tmp_path / "hf", tmp_path / "out")


def test_a_trained_model_knows_which_experts_of_the_base_it_has(tmp_path):
    deepseek(tmp_path / "hf", num_hidden_layers=3)
    usage = {"text": [[1, 9, 1, 9, 1, 9], [9, 9, 9, 1, 1, 1]]}
    (tmp_path / "usage.json").write_text(json.dumps(usage))
    options = ImportOptions("partition", "frame:2x16", usage=str(tmp_path / "usage.json"))
    checkpoint = in_one_process(import_model, tmp_path / "hf", tmp_path / "native", options)
    run_ranks(1, load_and_save, checkpoint, checkpoint, tmp_path / "run", [])
    in_one_process(export_model, tmp_path / "run", tmp_path / "back", "deepseek-v2", None, "5GB", "all")
    assert_same_files(tmp_path / "hf", tmp_path / "back")
    shutil.rmtree(checkpoint)
    plan = plan_export(tmp_path / "run", "deepseek-v2", None, "all")
    assert plan.note.startswith("experts keep their logical numbers: no record of an import")


def all_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = StateReader(checkpoint / STATE)
    return {key: reader.read_whole(key) for key in reader.forms}


def test_several_ranks_write_what_one_writes(tmp_path):
    deepseek(tmp_path / "hf", **SIZES)
    one = in_one_process(import_model, tmp_path / "hf", tmp_path / "one", EXPAND)
    three = run_ranks(3, import_model, tmp_path / "hf", tmp_path / "three", EXPAND)[0]
    assert len(list((three / STATE).glob("*.distcp"))) == 3
    first, second = all_tensors(one), all_tensors(three)
    assert first.keys() == second.keys() and first
    assert all(torch.equal(first[key], second[key]) for key in first)
    in_one_process(export_model, one, tmp_path / "out1", "deepseek-v2", None, "20KB")
    run_ranks(3, export_model, three, tmp_path / "out3", "deepseek-v2", None, "20KB")
    files = sorted(path.name for path in (tmp_path / "out1").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "out3").iterdir()) and len(files) > 8
    assert all((tmp_path / "out1" / name).read_bytes() == (tmp_path / "out3" / name).read_bytes() for name in files)


def test_a_rank_that_finds_a_broken_tensor_stops_all(tmp_path):
    deepseek(tmp_path / "hf", **SIZES)
    file = tmp_path / "hf" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-4:] = torch.tensor([float("nan")]).numpy().tobytes()
    file.write_bytes(content)
    with pytest.raises(RuntimeError, match="holds values that are not finite|SystemExit"):
        run_ranks(2, import_model, tmp_path / "hf", tmp_path / "native", EXPAND)
    assert not (tmp_path / "native").exists()


def test_a_head_that_is_not_the_embedding_it_is_said_to_be_stops_every_rank(tmp_path):
    deepseek(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(RuntimeError, match="lm_head.weight, which differs from model.embed_tokens.weight|SystemExit"):
        run_ranks(2, import_model, tmp_path / "hf", tmp_path / "native", EXPAND)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_two_ranks_verify_as_one(tmp_path):
    deepseek(tmp_path / "hf")
    run_ranks(2, import_model, tmp_path / "hf", tmp_path / "native", EXPAND)
    checks = json.loads((tmp_path / "native" / "conversion.json").read_text())["checks"]
    assert checks["logits"]["top1_agreement"] == 1 and len(checks["logits"]["layers"]) == 3
    run_ranks(2, export_model, tmp_path / "native", tmp_path / "out", "deepseek-v2")


def spoil_and_import(source: Path, out: Path) -> None:
    produce = ImportPlan.produce
    ImportPlan.produce = lambda plan, region: (
        produce(plan, region).flip(-1)
        if region.key.startswith("decoder.layers.2.mlp.router")
        else produce(plan, region)
    )
    import_model(source, out, EXPAND)


def test_a_wrong_weight_stops_every_rank(tmp_path):
    deepseek(tmp_path / "hf")
    with pytest.raises(RuntimeError, match="the models differ from layer 2 on|SystemExit"):
        run_ranks(2, spoil_and_import, tmp_path / "hf", tmp_path / "native")
    assert not (tmp_path / "native").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder where the commands imported ``hf`` as ``base`` and trained it for two steps as ``run``."""
    folder = tmp_path_factory.mktemp("commands")
    deepseek(folder / "hf")
    tool = ROOT / "tools" / "convert_checkpoint.py"
    sequential = "model.moe.expert_backend=sequential"
    wanted = ["--experts", "expand", "--audio-vocab", "frame:2x16", sequential]
    status, out, err = run(tool, "import", "--hf", f"{folder}/hf", "--out", f"{folder}/base", *wanted)
    assert status == 0, err
    assert "read back equal bit for bit" in out and "same top-1 on 100.0%" in out and "B/s in 0" in err
    config = load_config(folder / "base" / "config.yaml")
    write_dataset(folder / "asr", config, "asr", seed=1, num_documents=8)
    options = {
        "run_dir": folder / "run",
        "training.train_iters": 2,
        "training.global_batch_size": 2,
        "data.seq_length": 32,
        "data.train": f"[{{path: {folder}/asr}}]",
        "logging.tensorboard": "false",
        "optimizer.lr": 1e-3,
    }
    overrides = [f"{name}={value}" for name, value in options.items()]
    pretrain = ROOT / "examples" / "pretrain_most.py"
    status, out, err = run(pretrain, "--config", f"{folder}/base/config.yaml", *overrides)
    assert status == 0, err
    assert f"starting from the weights of {folder}/base" in out
    return folder


def test_a_trained_model_leaves_and_the_two_agree(trained):
    tool, model = ROOT / "tools" / "convert_checkpoint.py", trained / "out"
    status, out, err = run(
        tool, "export", "--checkpoint", f"{trained}/run", "--format", "deepseek-v2", "--out", str(model)
    )
    assert status == 0, err
    assert "kept in most_extension.json" in out
    report = trained / "report.json"
    verify = ["verify", "--hf", str(model), "--checkpoint", f"{trained}/run", "--report", str(report)]
    status, out, err = run(tool, *verify)
    assert status == 0, err
    found = json.loads(report.read_text())
    assert found["relative_difference"] < 1e-5 and found["top1_agreement"] == 1 and len(found["layers"]) == 3
    assert found["first_layer_above_tolerance"] is None


def test_verify_fails_between_models_that_differ_and_says_where(trained):
    tokens = trained / "tokens.jsonl"
    tokens.write_text("[3, 1, 4, 1, 5]\n[9, 2, 6, 5, 3]\n")
    tool = ROOT / "tools" / "convert_checkpoint.py"
    verify = ["verify", "--hf", f"{trained}/hf", "--checkpoint", f"{trained}/run", "--tokens", str(tokens)]
    status, out, err = run(tool, *verify)
    assert status == 1
    assert "logits of 10 tokens" in out
    *progress, error = err.splitlines()
    assert progress[-1].startswith("verify: 3/3 layers")
    assert error.startswith("error: ") and "the models differ from layer 0 on" in error


@pytest.mark.parametrize("line, match", [
    ("[1, 2", "tokens.jsonl: not readable as JSON lines"),
    ("[1, 2]\n[3]", "tokens.jsonl: must hold one list of ids per line"),
    ("[1, -2]", "tokens.jsonl: must hold one list of ids per line"),
    ("[1, 90]", "tokens: id 90 is not one of the 90 ids that both models have"),
])  # fmt: skip
def test_tokens_that_cannot_be_compared(trained, tmp_path, line, match):
    (tmp_path / "tokens.jsonl").write_text(line)
    verify = {"hf": trained / "hf", "checkpoint": trained / "run", "tokens": tmp_path / "tokens.jsonl"}
    with pytest.raises(RuntimeError, match=match):
        in_one_process(verify_command, Namespace(**verify, tolerance=1e-4, report=None, allow_pickle=False))


def test_verify_is_for_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="verify: runs in one process; start it without torchrun"):
        verify_command(Namespace())


def test_inspect_reads_pickles_when_asked(trained, tmp_path):
    torch.save(load_file(trained / "hf" / "model.safetensors"), tmp_path / "pytorch_model.bin")
    shutil.copy(trained / "hf" / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="pytorch_model.bin: is a pickle.*--allow-pickle"):
        describe(tmp_path)
    assert describe(tmp_path, allow_pickle=True) == describe(trained / "hf")


def test_inspect_tells_both_kinds(trained):
    native = describe(trained / "run")
    assert native["kind"] == "native checkpoint" and native["step"].startswith("2,")
    assert native["experts"] == "12 in logical order: text 0..5, audio 6..11"
    assert native["optimizer"] != "none" and native["made by"] == "training"
    assert describe(trained / "base", checksums=True)["made by"] == "deepseek-v2, expand"
    foreign = describe(trained / "hf")
    assert foreign["kind"] == "Hugging Face model" and foreign["experts"] == "6, top-2"
    status, out, err = run(ROOT / "tools" / "convert_checkpoint.py", "inspect", f"{trained}/hf", "--json")
    assert status == 0, err
    assert json.loads(out) == foreign
