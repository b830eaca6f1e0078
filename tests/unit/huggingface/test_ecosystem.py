"""Exports in the libraries of the ecosystem, none of which knows this package: PEFT, TRL, accelerate, lm-eval."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megatron_most import parallel
from megatron_most.checkpointing import read_metadata
from megatron_most.checkpointing.directory import STATE
from megatron_most.conversion import ImportOptions, export_model, import_model
from megatron_most.conversion.export_plan import stored_config
from megatron_most.conversion.verification import whole_model
from megatron_most.huggingface import MoSTForConditionalGeneration, MoSTProcessor
from tests.distributed.tiny import tiny_batch
from tests.pages import code_blocks
from tests.unit.huggingface.exports import config_of, exported, exported_model, write_native, write_with_tokenizer
from tests.unit.huggingface.test_parity import assert_close

pytestmark = pytest.mark.slow

ATTENTION = {
    "mla": ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    "gqa": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module", params=["frame", "gqa"])
def folder(request, tmp_path_factory) -> Path:
    """An export with a tokenizer; latent attention, and grouped-query attention."""
    made = tmp_path_factory.mktemp(request.param)
    return export_model(write_with_tokenizer(request.param, made), made / "hf", "hf")


def load(folder: Path, **options: Any) -> MoSTForConditionalGeneration:
    return MoSTForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, **options).eval()


def speech_batch(folder: Path) -> dict[str, torch.Tensor]:
    """Two utterances, to be transcribed and to be spoken."""
    processor, random = MoSTProcessor.from_pretrained(folder), np.random.default_rng(5)
    pairs = [(text, random.integers(0, 16, (frames, 2))) for text, frames in (("the old cat", 5), ("gray dogs", 3))]
    return processor.collate(
        [processor.example(task, text=text, codes=codes) for task in ("asr", "tts") for text, codes in pairs]
    )


def native_logits(checkpoint: Path, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Of each row of ``batch``, without its padding."""
    config = stored_config(checkpoint, read_metadata(checkpoint))
    parallel.initialize(config.parallel, seed=0)
    try:
        model, rows = whole_model(config, checkpoint / STATE).eval(), []
        for ids, codes, is_real in zip(batch["input_ids"], batch["codes"], batch["attention_mask"] == 1, strict=True):
            ids, codes = ids[is_real][None], codes[is_real][None]
            modality = config.vocab.modality_of(ids)
            with torch.no_grad():
                rows.append(model(ids, modality, torch.zeros_like(ids, dtype=torch.bool), codes)[0][0])
        return rows
    finally:
        parallel.destroy()


@pytest.mark.parametrize("what", ["attention", "experts", "speech"])
def test_an_adapter_learns_speech_and_its_merge_is_imported(folder, what, tmp_path):
    import peft

    model = load(folder)
    attention = ATTENTION[model.config.attention_type]
    options: dict[str, dict[str, Any]] = {
        "attention": {"target_modules": attention},
        "experts": {"target_modules": attention, "target_parameters": EXPERTS},
        "speech": {"target_modules": ["codebook_heads.0", "codebook_heads.1", "lm_head", "gate_proj", "up_proj"]},
    }
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **options[what]))
    names = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert names and all("lora_" in name for name in names)
    assert any("mlp.experts" in name for name in names) == (what == "experts")
    batch = speech_batch(folder)
    optimizer = torch.optim.AdamW((weight for weight in adapted.parameters() if weight.requires_grad), lr=1e-2)
    losses = []
    adapted.train()
    for _ in range(4):
        loss = adapted(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.05, losses
    adapted.eval()
    with torch.no_grad():
        expected = adapted(**batch).logits

    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        again = peft.PeftModel.from_pretrained(load(folder), tmp_path / "adapter")(**batch).logits
    assert_close(again, expected)

    adapted.merge_and_unload().save_pretrained(tmp_path / "tuned")
    for path in folder.glob("*token*"):
        shutil.copy(path, tmp_path / "tuned")
    checkpoint = import_model(tmp_path / "tuned", tmp_path / "native", ImportOptions())
    for row, theirs in zip(native_logits(checkpoint, batch), expected, strict=True):
        assert_close(row, theirs[-len(row) :])


def test_names_of_single_experts_are_no_modules_and_adapt_the_shared_experts_alone():
    """What the page warns of: the files name every expert's projections, the model has none of them."""
    import peft

    adapted = peft.get_peft_model(exported_model("frame"), peft.LoraConfig(target_modules=["down_proj"]))
    names = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert names and all("shared_experts" in name or "layers.0.mlp.down_proj" in name for name in names)


@pytest.mark.parametrize("case", ["frame", "per_modality_bias"])
def test_layers_may_lie_on_a_disk(case, tmp_path):
    config, expected_of = config_of(case), exported_model(case)
    batch = tiny_batch(config, seed=8)
    layers = {f"model.layers.{layer}": ("disk" if layer % 2 else "cpu") for layer in range(config.model.num_layers)}
    rest = ("model.embed_tokens", "model.codebook_embeddings", "model.norm", "model.rotary_emb", "codebook_heads")
    placed = load(
        exported(case)[1],
        device_map={**layers, **dict.fromkeys(rest, "cpu"), "lm_head": "disk"},
        offload_folder=tmp_path / "offload",
    )
    assert {"cpu", "disk"} == set(placed.hf_device_map.values())
    assert placed.model.layers[1].mlp.experts.down_proj.is_meta
    with torch.no_grad():
        assert_close(placed(batch.ids, batch.codes).logits, expected_of(batch.ids, batch.codes).logits)


def test_a_map_that_accelerate_makes_never_splits_a_layer(tmp_path):
    model = exported_model("frame")
    sizes = [sum(weight.nbytes for weight in layer.parameters()) for layer in model.model.layers]
    total = sum(weight.nbytes for weight in model.parameters())
    placed = load(
        exported("frame")[1],
        device_map="auto",
        max_memory={"cpu": total - sizes[-1] // 2},
        offload_folder=tmp_path / "offload",
    )
    assert "disk" in placed.hf_device_map.values()
    assert not [name for name in placed.hf_device_map if name.count(".") > 2]
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert_close(placed(ids).logits, model(ids).logits)


TASKS = {
    "animals": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "stories": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
ROWS = [
    {"question": "the fox", "choices": [" sees dogs", " and"], "answer": 0},
    {"question": "a dog and", "choices": [" foxes", " the dog"], "answer": 1},
]


@pytest.mark.timeout(480)  # the harness reads its whole catalogue first
def test_lm_eval_runs_it_by_its_own_command_and_gives_this_packages_numbers(tmp_path):
    """Of a tokenizer without bytes: libraries differ in how they show those that are no text."""
    from lm_eval.api.instance import Instance

    from megatron_most.evaluation.harness import MostLM
    from tests.unit.evaluation.stubs import write_tokenizer

    config = config_of("frame")
    config.tokenizer = str(tmp_path / "text")
    write_tokenizer(tmp_path / "text")
    folder = export_model(write_native(config, tmp_path / "native"), tmp_path / "hf", "hf")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
        (tmp_path / "tasks" / f"{name}.yaml").write_text(
            yaml.safe_dump({"task": name, "test_split": "test", **data, **task})
        )
    command = [str(Path(sys.executable).parent / "lm_eval"), "run", "--model", "hf", "--tasks", ",".join(TASKS)]
    model = f"pretrained={folder},trust_remote_code=True,add_bos_token=True,text_only=True,dtype=float32"
    command += [
        "--model_args",
        model,
        "--include_path",
        str(tmp_path / "tasks"),
        "--device",
        "cpu",
        "--batch_size",
        "2",
    ]
    command += ["--log_samples", "--output_path", str(tmp_path / "out")]
    environment = {
        "PATH": "/usr/bin:/bin",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    def samples(name: str) -> list[dict[str, Any]]:
        [path] = (tmp_path / "out").rglob(f"samples_{name}_*.jsonl")
        return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda row: row["doc_id"])

    mine = MostLM(str(folder), batch_size=3)
    try:
        for sample in samples("animals"):
            pairs = [(one["arg_0"], one["arg_1"]) for one in sample["arguments"].values()]
            asked = [Instance("loglikelihood", sample["doc"], pair, 0) for pair in pairs]
            found = mine.loglikelihood(asked, disable_tqdm=True)
            for (value, is_greedy), [[theirs, theirs_is_greedy]] in zip(found, sample["resps"], strict=True):
                assert value == pytest.approx(float(theirs), abs=1e-4)
                assert str(is_greedy) == str(theirs_is_greedy)
        for sample in samples("stories"):
            [one] = sample["arguments"].values()
            [answer] = mine.generate_until([Instance("generate_until", sample["doc"], (one["arg_0"], one["arg_1"]), 0)])
            [[theirs]] = sample["resps"]
            assert answer.replace(" ", "") == theirs.replace(" ", "") != ""
    finally:
        parallel.destroy()


@pytest.fixture()
def trained_text(folder, tmp_path) -> dict[str, Any]:
    """What trainers of TRL take."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, add_bos_token=True)
    common = {"per_device_train_batch_size": 2, "max_steps": 3, "report_to": "none", "use_cpu": True, "bf16": False}
    return {
        "model": load(folder),
        "processing_class": tokenizer,
        "common": {"output_dir": str(tmp_path / "out"), "learning_rate": 1e-2, "logging_steps": 1, **common},
    }


def test_trl_fine_tunes_it_on_text(folder, trained_text):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": "the old", "completion": " dog sees"}, {"prompt": "seven", "completion": " gray cats"}]
    model = trained_text["model"]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(max_length=64, **trained_text["common"]),
        train_dataset=Dataset.from_list(rows),
        processing_class=trained_text["processing_class"],
        peft_config=LoraConfig(r=4, target_modules=ATTENTION[model.config.attention_type]),
    )
    # What the trainer reads is what training reads: the beginning of sequence, the text, its end; prompts no targets.
    ids = MoSTProcessor.from_pretrained(folder).example("text", "the old dog sees")["input_ids"].tolist()
    assert trainer.train_dataset[0]["input_ids"] == ids
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        expected = load(folder)(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(expected.item(), rel=1e-4)
    assert losses[-1] < losses[0]


def test_trl_prefers_what_it_is_told_to(trained_text):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": "the old", "chosen": " dog sees", "rejected": " cats"},
        {"prompt": "seven", "chosen": " gray cats", "rejected": " dog"},
    ]
    model = trained_text["model"]
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(max_length=64, **trained_text["common"]),
        train_dataset=Dataset.from_list(rows),
        processing_class=trained_text["processing_class"],
        peft_config=LoraConfig(r=4, target_modules=ATTENTION[model.config.attention_type]),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-4)  # the reference is the model without its adapter
    assert losses[-1] < losses[0]


def test_the_examples_of_the_page_run(tmp_path, monkeypatch):
    """In order, in one session, but for the codec, of which there is none here, and for what names a GPU."""
    made = export_model(write_with_tokenizer("frame", tmp_path), tmp_path / "model", "hf")
    monkeypatch.chdir(made.parent)
    codes = np.random.default_rng(5).integers(0, 16, (5, 2))
    stand_ins = {"encode": lambda waveform: codes, "decode": len, "waveform": None, "batches": [(["the old"], [codes])]}
    names: dict[str, Any] = {**stand_ins}
    blocks = [block.text for block in code_blocks("docs/huggingface.md") if block.language == "python"]
    blocks = [text for text in blocks if "nemo" not in text and "offload" not in text]
    assert len(blocks) == 7
    for text in blocks:
        text = re.sub(r'output_dir="(sft|dpo)"', r'output_dir="\1", use_cpu=True, report_to="none"', text)
        exec(compile(text, "docs/huggingface.md", "exec"), names)
    assert {"adapter", "tuned", "sft", "dpo"} <= {path.name for path in tmp_path.iterdir()}
    assert len(names["codes"]) <= 200 and isinstance(names["answer"], str)
