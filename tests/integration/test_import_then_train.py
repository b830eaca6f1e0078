"""The configuration that an import writes trains from any directory, given only where the run and its data are."""

from __future__ import annotations

import json
import math

import pytest

from megatron_most.config import load_config
from megatron_most.text import train_sentencepiece
from tests.integration.test_commands import ROOT, run
from tests.integration.tiny_run import write_dataset
from tests.unit.conversion.models import deepseek

TINY = (
    "model.moe.expert_backend=sequential",
    "data.seq_length=32",
    "training.train_iters=2",
    "training.global_batch_size=2",
    "logging.log_interval=1",
    "logging.tensorboard=false",
)


def test_the_written_configuration_trains_from_another_directory(tmp_path, monkeypatch):
    deepseek(tmp_path / "hf", vocab_size=400)
    train_sentencepiece(["the old brown dog sees seven gray cats"] * 4, tmp_path / "hf" / "tokenizer.model", 300)
    monkeypatch.chdir(tmp_path)
    import_command = ("import", "--hf", "hf", "--out", "base", "--experts", "expand", "--audio-vocab", "frame:2x1000")
    status, out, err = run(ROOT / "tools" / "convert_checkpoint.py", *import_command, *TINY)
    assert status == 0, err
    assert "base/config.yaml: codec: not set, and generation needs it" in out
    config = load_config(tmp_path / "base" / "config.yaml")
    assert config.model.codebook_loss_weights == [0.5, 0.5]
    write_dataset(tmp_path / "tts", config, "tts", seed=1, num_documents=8)

    (tmp_path / "base").rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    overrides = ("run_dir=run", "data.train=[{path: ../tts}]")
    status, out, err = run(ROOT / "examples" / "pretrain_most.py", "--config", "../moved/config.yaml", *overrides)
    assert status == 0, err
    assert "starting from the weights of ../moved" in out
    first, *_, last = map(json.loads, (tmp_path / "elsewhere" / "run" / "metrics.jsonl").read_text().splitlines())
    assert first["step"] == 1 and last["step"] == 2
    codes = [first["loss/codebook_0"], first["loss/codebook_1"]]
    assert codes == pytest.approx([math.log(1000)] * 2, rel=0.01)
    # The id of a frame, end of audio: about as likely as one of 400 text ids.
    assert first["loss/audio"] - math.log(1000) == pytest.approx(math.log(400), rel=0.2)
