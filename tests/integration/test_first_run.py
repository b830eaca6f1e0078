"""docs/first-run.md, command for command, at toy size: what it says of every step is so.

The commands come from the page. What differs is all here: the downloads (first_run_downloads.py), the numbers in
:data:`IN_COMMANDS`, and the values of the recipe in :data:`IN_RECIPE`. What the page or the recipe no longer has fails
a test, and so does a section that :data:`CHECKS` does not know.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

import pytest
import soundfile
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoProcessor

from tests.integration.first_run_downloads import UTTERANCES, make_downloads
from tests.integration.launching import environment, started, wait_for
from tests.pages import ROOT, Block, code_blocks

PAGE = "docs/first-run.md"
RECIPE = "examples/configs/most_16b_librispeech.yaml"
RUN = "runs/most_16b_librispeech"

IN_COMMANDS = {
    "--audio-vocab frame:13x2016": "--audio-vocab frame:4x1000",
    "--gpus 8": "--gpus 2",
    "--text-vocab-size 102400": "--text-vocab-size 512",
    "--max-length 4096": "--max-length 512",
    "--world-size 8": "--world-size 2",
    "--nproc-per-node 8": "--nproc-per-node 2",
}
"""The model, the codec and the machine are smaller."""

IN_RECIPE: dict[str, Any] = {
    "vocab.text_vocab_size": 512,
    "vocab.num_codebooks": 4,
    "vocab.codebook_size": 1000,
    "model.num_layers": 3,
    "model.hidden_size": 64,
    "model.ffn_hidden_size": 96,
    "model.codebook_loss_weights": [0.25] * 4,
    "model.attention.num_attention_heads": 4,
    "model.attention.kv_lora_rank": 16,
    "model.attention.qk_head_dim": 16,
    "model.attention.qk_pos_emb_head_dim": 8,
    "model.attention.v_head_dim": 16,
    "model.moe.groups": [{"modality": name, "size": 4, "moe_router_topk": 2} for name in ("text", "audio")],
    "model.moe.moe_ffn_hidden_size": 32,
    "model.moe.moe_shared_expert_intermediate_size": 64,
    "parallel.expert_model_parallel_size": 2,
    "data.seq_length": 512,
    "optimizer.lr": 2e-3,
    "optimizer.min_lr": 2e-4,
    "optimizer.lr_warmup_iters": 2,
    "training.train_iters": 30,
    "training.global_batch_size": 4,
    "training.eval_interval": 10,
    "training.eval_iters": 1,
    "checkpoint.save_interval": 10,
    "logging.log_interval": 1,
}
"""The model and the codec are smaller, and the run is shorter, so it learns faster."""


def toy_commands(text: str) -> str:
    for shown, toy in IN_COMMANDS.items():
        text = re.sub(rf"{re.escape(shown)}\b", toy, text)
    return text


def toy_recipe() -> str:
    recipe = OmegaConf.load(ROOT / RECIPE)
    for key, toy in IN_RECIPE.items():
        OmegaConf.update(recipe, key, toy, merge=False)
    return OmegaConf.to_yaml(recipe)


def test_the_toy_differs_from_the_page_in_what_the_page_has() -> None:
    commands = "".join(block.text for block in code_blocks(PAGE))
    assert [shown for shown in IN_COMMANDS if not re.search(rf"{re.escape(shown)}\b", commands)] == []
    # What the page shows and the toy has not: nothing of the real size is left.
    assert not re.search(r"\b8\b|13x2016|4096|102400", toy_commands(commands))
    recipe = OmegaConf.load(ROOT / RECIPE)
    missing = object()
    same = [key for key, toy in IN_RECIPE.items() if OmegaConf.select(recipe, key, default=missing) in (missing, toy)]
    assert same == []


def test_every_section_with_commands_is_checked() -> None:
    assert list(CHECKS) == list(dict.fromkeys(block.section for block in code_blocks(PAGE)))


class Walk:
    """The page's commands in a folder, where ``examples`` is what a clone has."""

    def __init__(self, folder: Path) -> None:
        self.downloads, self.folder = folder / "downloads", folder / "work"

    def prepare(self) -> None:
        make_downloads(self.downloads)
        (self.folder / RECIPE).parent.mkdir(parents=True)
        (self.folder / RECIPE).write_text(toy_recipe())

    def follow(self, block: Block) -> str:
        """Run a block; the page says that a training may be stopped, and goes on when the command is repeated."""
        if "most torchrun" in block.text:
            self.stop(block, lambda: self.steps_logged() >= 3)
        return self.run(block)

    def steps_logged(self) -> int:
        path = self.path(f"{RUN}/metrics.jsonl")
        return len(path.read_text().splitlines()) if path.exists() else 0

    def run(self, block: Block) -> str:
        """What the block's commands print; each of them must succeed."""
        log = self.path("output.log")
        with log.open("w") as output, self._started(block, output) as shell:
            status = shell.wait()
        text = log.read_text()
        assert status == 0, f"{PAGE}, line {block.line}: exit status {status}\n{text[-6000:]}"
        return text

    def stop(self, block: Block, happened: Callable[[], bool]) -> None:
        """Start the block's commands, and press Ctrl-C in their terminal when ``happened``."""
        with self.path("stopped.log").open("w") as output, self._started(block, output) as shell:
            wait_for("what Ctrl-C waits for", lambda: happened() or shell.poll() is not None, seconds=600)
            os.killpg(shell.pid, signal.SIGINT)
            shell.wait()

    def _started(self, block: Block, output: IO[str]) -> AbstractContextManager[subprocess.Popen[bytes]]:
        """A shell in a terminal of its own, as far as Ctrl-C goes, that stops at the first command that fails."""
        settings = environment()
        settings["PATH"] = f"{self.downloads}:{settings['PATH']}"
        shell = ["/bin/bash", "--norc", "-exo", "pipefail", "-c", toy_commands(block.text)]
        return started(shell, cwd=self.folder, env=settings, stdout=output, stderr=output)

    def path(self, name: str) -> Path:
        return self.folder / name


def check_downloads(walk: Walk, output: str) -> None:
    assert {path.name for path in walk.path("LibriSpeech").iterdir() if path.is_dir()} == UTTERANCES.keys()
    assert walk.path("DeepSeek-V2-Lite/config.json").is_file()
    assert [path.suffix for path in walk.path("codecs").iterdir() if path.is_file()] == [".nemo"]


def check_convert(walk: Walk, output: str) -> None:
    """Half of the experts are audio's, and what the recipe names is there."""
    assert "read back equal bit for bit" in output
    assert "text 0..3, audio 4..7" in output
    recipe = OmegaConf.load(walk.path(RECIPE))
    assert walk.path(recipe.checkpoint.load).is_dir() and walk.path(recipe.tokenizer).is_file()


def check_plan(walk: Walk, output: str) -> None:
    """The layouts that fit, the time of a step by its parts, disk and host memory."""
    assert re.search(r"\d layouts of 2 x h100 fit", output)
    for line in (
        "a step on h100, estimated .*tokens/s",
        "  router .*%, ",
        "a checkpoint: .* GB on disk",
        "host memory for",
    ):
        assert re.search(rf"^{line}", output, re.MULTILINE), line


def check_data(walk: Walk, output: str) -> None:
    """Manifests in lower case, datasets for all that the recipe names, and a document to look at and listen to."""
    for name, prefix in (("librispeech", "train"), ("librispeech_dev", "dev")):
        records = [json.loads(line) for line in walk.path(f"{name}.jsonl").read_text().splitlines()]
        assert len(records) == sum(count for split, count in UTTERANCES.items() if split.startswith(prefix))
        assert all(record["text"].islower() for record in records)
        assert f"codes/{name}: {len(records)} utterances" in output
    recipe = OmegaConf.load(walk.path(RECIPE))
    for entry in (*recipe.data.train, *recipe.data.validation):
        assert walk.path(f"{entry.path}.json").is_file(), entry.path
    assert re.search(r"^document 0: .*: the old captain went home \[<\d+ frames>\]$", output, re.MULTILINE)
    assert soundfile.info(walk.path("document_0.wav")).duration > 1


def check_train(walk: Walk, output: str) -> None:
    """The run was stopped and went on; the metrics that the page names are there, and fall or are 0 as it says."""
    assert re.search(r"^resuming from .*step_000000\d\d", output, re.MULTILINE), output[-6000:]
    lines = [json.loads(line) for line in walk.path(f"{RUN}/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, IN_RECIPE["training.train_iters"] + 1))
    last_codebook = f"loss/codebook_{IN_RECIPE['vocab.num_codebooks'] - 1}"
    named = re.findall(r"`((?:validation|routing|loss)/[^`]+)`", (ROOT / PAGE).read_text())
    assert len(named) == 4
    for name in named:
        name = name.replace("loss/codebook_12", last_codebook)
        for key in {name.replace("*", modality) for modality in ("text", "audio")}:
            values = [line[key] for line in lines if key in line]
            assert values[-1] < values[0] or values[-1] == 0, f"{key}: {values}"
            assert values[-1] == 0 or "dead_experts" not in key, f"{key}: {values}"


def check_rates(walk: Walk, output: str) -> None:
    for split in ("test-clean", "test-other"):
        result = json.loads(walk.path(f"{RUN}/evaluation/asr_{split}.json").read_text())
        assert (result["num_utterances"], result["num_failed"]) == (UTTERANCES[split], 0)
        assert result["normalizer"] == "whisper-english" and result["wer"] > 0
        assert re.search(rf"^asr {split}: WER ", output, re.MULTILINE)
    result = json.loads(walk.path(f"{RUN}/evaluation/tts_test-clean.json").read_text())
    assert (result["num_utterances"], result["num_failed"]) == (UTTERANCES["test-clean"], 0)
    assert result["settings"]["recognizer"].startswith("HubertForCTC in hubert-large-ls960-ft (")
    assert re.search("^tts test-clean: WER ", output, re.MULTILINE)


def check_end(walk: Walk, output: str) -> None:
    """Sound, a report with the word error rates, and a folder that speaks without this project."""
    assert soundfile.info(walk.path("spoken.wav")).frames > 0
    report = walk.path(f"{RUN}/report.html").read_text()
    assert "test-clean" in report and "test-other" in report
    model = AutoModelForCausalLM.from_pretrained(walk.path("most_16b_librispeech_hf"), trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(walk.path("most_16b_librispeech_hf"), trust_remote_code=True)
    [codes] = model.speak(processor, ["the weather was fine"], max_frames=3)
    assert codes.shape == (3, IN_RECIPE["vocab.num_codebooks"])


CHECKS: dict[str, Callable[[Walk, str], None]] = {
    "1. Downloads": check_downloads,
    "2. Convert": check_convert,
    "3. Plan": check_plan,
    "4. Tokenize and build": check_data,
    "5. Train": check_train,
    "6. Word error rates": check_rates,
    "7. Listen, look, take it away": check_end,
}


@pytest.mark.slow
@pytest.mark.timeout(2700)
def test_the_first_run_runs_as_it_is_written(tmp_path: Path) -> None:
    walk = Walk(tmp_path)
    walk.prepare()
    for section, check in CHECKS.items():
        check(walk, "".join(walk.follow(block) for block in code_blocks(PAGE) if block.section == section))
