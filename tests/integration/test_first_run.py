"""docs/first-run.md, command for command, at toy size: what it says of every step is so.

The commands come from the page. What differs is all here: the downloads (first_run_downloads.py), the numbers in
:data:`IN_COMMANDS`, and the values of the recipe in :data:`IN_RECIPE`. A difference that the page or the recipe no longer
has fails the test, as does a section that :data:`CHECKS` does not know.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.integration.first_run_downloads import UTTERANCES, make_downloads
from tests.integration.launching import environment
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

    def run(self, block: Block) -> str:
        """What the block's commands print; each of them must succeed."""
        settings = environment()
        settings["PATH"] = f"{self.downloads}:{settings['PATH']}"
        shell = ["/bin/bash", "--norc", "-exo", "pipefail", "-c", toy_commands(block.text)]
        done = subprocess.run(shell, cwd=self.folder, env=settings, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{PAGE}, line {block.line}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    def path(self, name: str) -> Path:
        return self.folder / name


def check_downloads(walk: Walk, output: str) -> None:
    assert {path.name for path in walk.path("LibriSpeech").iterdir() if path.is_dir()} == UTTERANCES.keys()
    assert walk.path("DeepSeek-V2-Lite/config.json").is_file()
    assert [path.suffix for path in walk.path("codecs").iterdir() if path.is_file()] == [".nemo"]


def check_convert(walk: Walk, output: str) -> None: ...
def check_plan(walk: Walk, output: str) -> None: ...
def check_data(walk: Walk, output: str) -> None: ...
def check_train(walk: Walk, output: str) -> None: ...
def check_rates(walk: Walk, output: str) -> None: ...
def check_end(walk: Walk, output: str) -> None: ...


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
@pytest.mark.timeout(1800)
def test_the_first_run_runs_as_it_is_written(tmp_path: Path) -> None:
    walk = Walk(tmp_path)
    walk.prepare()
    for section, check in CHECKS.items():
        check(walk, "".join(walk.run(block) for block in code_blocks(PAGE) if block.section == section))
