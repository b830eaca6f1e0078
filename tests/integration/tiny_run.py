"""A tiny training run on tiny datasets, for tests that start, stop and resume it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_most.config import DatasetConfig, RunConfig
from megatron_most.data.storage.documents import Document
from megatron_most.data.storage.token_dataset import DatasetWriter
from megatron_most.training import StepHook, Trainer
from tests.distributed.tiny import tiny_config

NOT_REPEATABLE = {"time", "tokens_per_second", "step_seconds", "max_memory_bytes"}


def write_dataset(prefix: Path, config: RunConfig, task: str, seed: int, num_documents: int) -> DatasetConfig:
    """Random documents ``<id> begin frames end text``; the loss is on the text (asr) or on the audio (tts)."""
    random, vocab = np.random.default_rng(seed), config.vocab
    with DatasetWriter(prefix, task, vocab) as writer:
        for _ in range(num_documents):
            num_frames, num_words = int(random.integers(3, 9)), int(random.integers(2, 8))
            text = random.integers(2, vocab.text_vocab_size, num_words)
            ids = np.concatenate([[1, vocab.begin_of_audio], [vocab.frame] * num_frames, [vocab.end_of_audio], text])
            codes = random.integers(0, vocab.codebook_size, (num_frames, vocab.num_codebooks))
            loss_mask = np.arange(len(ids)) >= (3 + num_frames if task == "asr" else 2)
            writer.add(Document(ids.astype(np.int64), loss_mask, 2 + np.arange(num_frames), codes))
        writer.commit({})
    return DatasetConfig(str(prefix))


def run_config(directory: Path, run_name: str = "run", **overrides: Any) -> RunConfig:
    """A six-step run below ``directory``, where its datasets are written first; ``section__field=value`` overrides."""
    options = {
        "run_dir": directory / run_name,
        "training__train_iters": 6,
        "training__micro_batch_size": 1,
        "training__global_batch_size": 4,
        "training__eval_interval": 3,
        "training__eval_iters": 1,
        "training__threads_per_rank": 1,
        "optimizer__lr": 1e-3,
        "optimizer__lr_warmup_iters": 2,
        "checkpoint__save_interval": 3,
        "logging__log_interval": 2,
        "logging__tensorboard": False,
        "data__audio_frame_dropout": 0.2,
    }
    config = tiny_config(**{**options, **overrides})
    data = directory / "data"
    if not data.exists():
        write_dataset(data / "asr", config, "asr", seed=1, num_documents=24)
        write_dataset(data / "tts", config, "tts", seed=2, num_documents=24)
        write_dataset(data / "heldout", config, "asr", seed=3, num_documents=8)
    config.data.train = [DatasetConfig(str(data / "asr"), 1.0), DatasetConfig(str(data / "tts"), 2.0)]
    config.data.validation = [DatasetConfig(str(data / "heldout"))]
    return config


class BeforeStep(StepHook):
    """Calls ``action`` when ``step`` is about to begin."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self.step, self.action = step, action

    def before_step(self, trainer: Trainer) -> None:
        if trainer.state.step + 1 == self.step:
            self.action()


def train(config: RunConfig, *hooks: StepHook) -> dict[str, torch.Tensor]:
    """Run to the end on this rank and return its weights; empty when there was nothing left to train."""
    trainer = Trainer(config, hooks)
    trainer.run()
    chunks = trainer.state.model_chunks if hasattr(trainer, "state") else []
    return {
        f"{index}.{name}": value.clone()
        for index, chunk in enumerate(chunks)
        for name, value in chunk.state_dict().items()
        if torch.is_tensor(value)
    }


def metric_lines(config: RunConfig, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a run's metrics, without what depends on the clock."""
    text = (Path(config.run_dir) / name).read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return [{key: value for key, value in line.items() if key not in NOT_REPEATABLE} for line in lines]


def assert_same_weights(first: list[dict[str, torch.Tensor]], second: list[dict[str, torch.Tensor]]) -> None:
    """Bit for bit, on every rank."""
    for rank, (mine, theirs) in enumerate(zip(first, second, strict=True)):
        assert mine.keys() == theirs.keys() and mine
        for name, value in mine.items():
            assert torch.equal(value, theirs[name]), f"rank {rank}: {name} differs"
