"""The exported folder: weights that come back bit for bit, code that needs nothing else, and a card."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file

import megatron_most.huggingface
from megatron_most.checkpointing import Fingerprint, read_metadata
from megatron_most.checkpointing.directory import STATE, step_directory
from megatron_most.checkpointing.regions import StateReader
from megatron_most.conversion import ImportOptions, describe, export_model, import_model
from megatron_most.data.storage.sidecar import write_sidecar
from megatron_most.errors import CheckpointError, ConfigError
from megatron_most.huggingface import MoSTForConditionalGeneration, MoSTProcessor
from megatron_most.text.tokenizer import SentencePieceTokenizer
from tests.distributed.tiny import tiny_batch
from tests.unit.evaluation.stubs import write_tokenizer
from tests.unit.huggingface.exports import (
    config_of,
    exported,
    exported_model,
    parameters,
    write_native,
    write_with_tokenizer,
)
from tests.unit.install.requirements import closure

WITH_OTHER_TENSORS = (
    "frame",
    "flat",
    "q_lora",
    "gqa",
    "no_shared",
    "common",
    "bias",
    "per_modality",
    "per_modality_bias",
    "three_modalities",
)
"""Cases that differ in which tensors there are, or in their shapes."""


def assert_same_weights(first: Path, second: Path) -> None:
    mine, theirs = (StateReader(path / STATE) for path in (first, second))
    assert mine.forms == theirs.forms and mine.forms
    for key in mine.forms:
        assert torch.equal(mine.read_whole(key), theirs.read_whole(key)), key


@pytest.mark.parametrize("case", parameters(WITH_OTHER_TENSORS))
def test_import_brings_everything_back(case, tmp_path):
    checkpoint, folder = exported(case)
    again = import_model(folder, tmp_path / "again", ImportOptions())
    assert_same_weights(checkpoint, again)
    mine, theirs = (read_metadata(path).config for path in (checkpoint, again))
    assert mine["model"] == theirs["model"] and mine["vocab"] == theirs["vocab"]


def test_bf16_weights_come_back_and_biases_stay_fp32(tmp_path):
    checkpoint = write_native(config_of("bias", precision__dtype="bf16"), tmp_path / "native")
    folder = export_model(checkpoint, tmp_path / "hf", "hf", max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    assert_same_weights(checkpoint, import_model(folder, tmp_path / "again", ImportOptions()))


def test_what_transformers_saves_again_is_imported(tmp_path):
    checkpoint, _ = exported("per_modality_bias")
    exported_model("per_modality_bias").save_pretrained(tmp_path / "saved")
    code = {path.name for path in (tmp_path / "saved").glob("*.py")}
    assert code == {path.name for path in exported("per_modality_bias")[1].glob("*.py")}
    assert_same_weights(checkpoint, import_model(tmp_path / "saved", tmp_path / "again", ImportOptions()))


def test_experts_have_tensors_of_their_own():
    names = load_file(exported("frame")[1] / "model.safetensors").keys()
    assert {f"model.layers.1.mlp.experts.7.{name}_proj.weight" for name in ("gate", "up", "down")} <= names
    assert {"model.codebook_embeddings.1.weight", "codebook_heads.1.weight", "lm_head.weight"} <= names


def test_a_configuration_that_contradicts_itself_is_refused(tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(exported("frame")[1], folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "score_rule": "all"}))
    with pytest.raises(CheckpointError, match="score_rule='all': run_config says 'group'"):
        import_model(folder, tmp_path / "again", ImportOptions())
    del values["run_config"]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="run_config=None"):
        import_model(folder, tmp_path / "again", ImportOptions())
    with pytest.raises(ConfigError, match="--audio-vocab: run_config in config.json already sets these"):
        import_model(exported("frame")[1], tmp_path / "again", ImportOptions(audio_vocab="flat:2x16"))


def test_inspect_describes_it():
    facts = describe(exported("frame")[1])
    assert (facts["format"], facts["attention"], facts["extension"]) == ("hf", "mla", "none")


def test_the_code_imports_torch_transformers_numpy_and_itself_alone():
    for path in Path(megatron_most.huggingface.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            else:
                continue
            for module in modules:
                top = module.split(".")[0]
                assert top in sys.stdlib_module_names or top in ("numpy", "torch", "transformers"), (path, module)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """An export with a tokenizer, a codec, two datasets of which one is gone, and a result of an evaluation."""
    folder = tmp_path_factory.mktemp("trained")
    data = {"licenses": {"codes": {"CC-BY-4.0": 5, "CC0": 2}}, "counts": {"documents": 7}}
    write_sidecar(folder / "asr.json", {"task": "asr", "vocab": {}, "provenance": data})
    result = {"suite": "asr", "set": "clean", "wer": 0.125, "num_utterances": 8, "normalizer": "whisper", "items": []}
    (folder / "run" / "evaluation").mkdir(parents=True)
    (folder / "run" / "evaluation" / "asr.json").write_text(json.dumps(result))
    checkpoint = write_with_tokenizer(
        "frame",
        folder,
        step_directory(folder / "run", 7),
        codec=Fingerprint("nano", "12ab"),
        datasets=[Fingerprint(str(folder / "asr"), "1"), Fingerprint(str(folder / "gone"), "2")],
    )
    return export_model(checkpoint, folder / "hf", "hf")


CLEAN = """
import sys
from importlib import metadata
from importlib.machinery import PathFinder
allowed = set(sys.argv[1].split(","))
normal = lambda name: name.lower().replace("_", "-").replace(".", "-")
blocked = {top for top, names in metadata.packages_distributions().items() if not allowed & set(map(normal, names))}
assert {"megatron", "nemo", "accelerate"} <= blocked
class Filter:  # in the place of the finder that goes through sys.path
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in blocked else PathFinder.find_spec(name, path, target)
    def find_distributions(context=metadata.DistributionFinder.Context()):
        return (found for found in PathFinder.find_distributions(context) if normal(found.name) in allowed)
sys.meta_path[sys.meta_path.index(PathFinder)] = Filter

import numpy, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor
torch.set_grad_enabled(False)

def load(kind, folder):
    return kind.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()

for case, (ids, codes, expected) in torch.load("cases.pt").items():
    model = load(AutoModelForCausalLM, case)
    found = model(ids, codes).logits
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    hidden = load(AutoModel, case)(ids, codes).last_hidden_state
    assert (model.lm_head(hidden) - found).abs().max() <= 1e-6 * expected.abs().max()
    model.save_pretrained("saved")
    assert torch.equal(load(AutoModelForCausalLM, "saved")(ids, codes).logits, found)
model = load(AutoModelForCausalLM, "trained")
processor = AutoProcessor.from_pretrained("trained", trust_remote_code=True)
codes = model.speak(processor, ["old cats"], max_frames=3)
assert len(codes[0]) in (1, 2, 3)
heard, expected = torch.load("speech.pt", weights_only=False)
assert model.transcribe(processor, heard, max_new_tokens=8) == expected
assert not [name for name in sys.modules if name.split(".")[0] in ("megatron", "megatron_most")]
print(type(model).__module__)
"""


@pytest.mark.slow
@torch.no_grad()
def test_it_loads_and_transcribes_where_torch_and_transformers_are_alone(tmp_path):
    """With a tokenizer.json; transformers needs further packages for a tokenizer of SentencePiece."""
    cases = {}
    for case in ("frame", "flat_delay", "per_modality_bias"):
        batch = tiny_batch(config_of(case), seed=8)
        cases[case] = (batch.ids, batch.codes, exported_model(case)(batch.ids, batch.codes).logits)
        shutil.copytree(exported(case)[1], tmp_path / case)
    write_tokenizer(tmp_path / "text")
    config = config_of("frame")
    config.tokenizer = str(tmp_path / "text")
    trained = export_model(write_native(config, tmp_path / "native"), tmp_path / "trained", "hf")
    torch.save(cases, tmp_path / "cases.pt")
    heard = [np.random.default_rng(frames).integers(0, 16, (frames, 2)) for frames in (9, 4)]
    model = MoSTForConditionalGeneration.from_pretrained(trained, dtype=torch.float32).eval()
    expected = model.transcribe(MoSTProcessor.from_pretrained(trained), heard, max_new_tokens=8)
    assert any(expected)
    torch.save((heard, expected), tmp_path / "speech.pt")
    allowed = closure([Requirement("torch"), Requirement("transformers")])
    # -S leaves out what site adds, editable installs among it; the folder of the packages is named.
    packages = str(Path(torch.__file__).parents[1])
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": packages, "HF_HOME": str(tmp_path / "cache")}
    result = subprocess.run(
        [sys.executable, "-S", "-c", CLEAN, ",".join(allowed)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip().startswith("transformers_modules.")


def test_the_card_says_what_it_is_made_of(trained):
    card = (trained / "README.md").read_text()
    for expected in (
        "7 steps, 896 tokens",
        "| asr | asr | 7 | CC-BY-4.0, CC0 |",
        "| gone | ? | ? | unknown",
        "| text | 4 | 2 |",
        "| asr | clean | 12.50% | 8 | whisper |",
        "nano, 2 codebooks of 16, layout `frame`",
    ):
        assert expected in card, card


def test_the_tokenizer_keeps_its_fingerprint(trained, tmp_path):
    again = import_model(trained, tmp_path / "again", ImportOptions())
    assert read_metadata(again).tokenizer.fingerprint == read_metadata(trained.parent / "run").tokenizer.fingerprint


def test_a_tokenizer_that_transformers_reads_differently_is_refused(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(SentencePieceTokenizer, "encode", lambda self, text: [5])
    with pytest.raises(CheckpointError, match=r"the tokenizer gives 'Transcribe:' the ids \[5\], in transformers \["):
        export_model(trained.parent / "run", tmp_path / "hf", "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("kind", [{}, {"tokenizer_class": "PreTrainedTokenizerFast"}])
def test_a_tokenizer_in_json_goes_along(kind, tmp_path):
    words = ["<s>", "</s>", "?", "<|user|>", "the", "old", "cats", "say", ":"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: id_ for id_, word in enumerate(words)}, "?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|user|>"])
    (tmp_path / "text").mkdir()
    tokenizer.save(str(tmp_path / "text" / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", **kind}
    (tmp_path / "text" / "tokenizer_config.json").write_text(json.dumps(settings))
    generation = {"eos_token_id": 2, "do_sample": True, "temperature": 0.6}
    (tmp_path / "text" / "generation_config.json").write_text(json.dumps(generation))
    config = config_of("frame")
    config.tokenizer = str(tmp_path / "text")
    folder = export_model(write_native(config, tmp_path / "native"), tmp_path / "hf", "hf")
    processor = MoSTProcessor.from_pretrained(folder)
    assert processor(["the old </s>"])["input_ids"].tolist() == [[0, 4, 5, 2, 2, 2]]
    assert processor.role_ids == {"system": 39, "user": 3, "assistant": 38}
    found = json.loads((folder / "generation_config.json").read_text())
    ids = {"bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": 1}
    assert found == {**generation, **ids, "suppress_tokens": [0]}
    assert ids.items() <= json.loads((folder / "config.json").read_text()).items()


def test_a_model_without_training_loads(tmp_path):
    model = MoSTForConditionalGeneration(megatron_most.huggingface.MoSTConfig())
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
