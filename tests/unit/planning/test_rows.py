"""What rows hold, from datasets and without them; and the files that a plan looks for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from megatron_most.config import DatasetConfig, RetentionConfig, RunConfig
from megatron_most.data.storage.documents import Document
from megatron_most.data.storage.token_dataset import DatasetWriter
from megatron_most.errors import CheckpointError, ConfigError
from megatron_most.planning import assumed_contents, check_files, row_contents
from tests.distributed.tiny import tiny_config


def write(
    config: RunConfig, prefix: Path, task: str, lengths: list[int], num_frames: int, predicts_frames: bool
) -> None:
    """Documents of ``lengths`` input positions: text, then ``num_frames`` frames. Targets: half of these, or text."""
    vocab = config.vocab
    with DatasetWriter(prefix, task, vocab) as writer:
        for length in lengths:
            ids = np.zeros(length + 1, dtype=np.int64)
            ids[-num_frames:] = vocab.frame
            coded = np.flatnonzero(ids == vocab.frame)
            mask = np.zeros(length + 1, dtype=bool)
            mask[-num_frames // 2 :] = predicts_frames
            mask[1:3] = not predicts_frames
            writer.add(Document(ids, mask, coded, np.zeros((len(coded), vocab.num_codebooks), dtype=np.int64)))
        writer.commit({})


def with_data(tmp_path: Path, **overrides: object) -> RunConfig:
    config = tiny_config(data__packing=True, training__micro_batch_size=1, **overrides)
    train = [DatasetConfig(str(tmp_path / "asr"), 1.0), DatasetConfig(str(tmp_path / "tts"), 3.0)]
    return dataclasses.replace(config, data=dataclasses.replace(config.data, train=train), tokenizer=None, codec=None)


def test_contents_are_those_of_the_datasets(tmp_path: Path) -> None:
    config = with_data(tmp_path)
    write(config, tmp_path / "asr", "asr", [10, 20], 5, predicts_frames=False)
    write(config, tmp_path / "tts", "tts", [16], 8, predicts_frames=True)
    rows = row_contents(config)
    asr, tts = 1 / 4, 3 / 4  # weights are shares of positions
    assert rows.source == "from the datasets"
    # The last frame of a document is only a label.
    assert rows.modalities["audio"] == pytest.approx(asr * 8 / 30 + tts * 7 / 16)
    assert rows.targets == pytest.approx(asr * 4 / 30 + tts * 4 / 16)
    assert rows.frame_targets == pytest.approx(tts * 4 / 16)
    assert rows.attended == pytest.approx(asr * (10 * 11 + 20 * 21) / 2 / 30 + tts * 17 / 2)


def test_a_share_of_audio_changes_the_mix(tmp_path: Path) -> None:
    config = with_data(tmp_path, data__audio_share=0.3)
    write(config, tmp_path / "asr", "asr", [30], 6, predicts_frames=False)
    write(config, tmp_path / "tts", "tts", [16], 9, predicts_frames=True)
    assert row_contents(config).modalities["audio"] == pytest.approx(0.3)


def test_rows_without_packing_attend_as_a_whole(tmp_path: Path) -> None:
    config = with_data(tmp_path)
    write(config, tmp_path / "asr", "asr", [10], 5, predicts_frames=False)
    write(config, tmp_path / "tts", "tts", [16], 8, predicts_frames=True)
    unpacked = dataclasses.replace(config, data=dataclasses.replace(config.data, packing=False))
    assert row_contents(unpacked).attended == (config.data.seq_length + 1) / 2


def test_a_missing_dataset_leaves_assumptions(tmp_path: Path) -> None:
    config = with_data(tmp_path)
    write(config, tmp_path / "asr", "asr", [10], 5, predicts_frames=False)
    assert row_contents(config) == assumed_contents(config)
    flat = tiny_config(vocab__layout="flat")
    assert assumed_contents(flat).frame_targets == 0 < assumed_contents(tiny_config()).frame_targets


def test_missing_files_are_named(tmp_path: Path) -> None:
    config = with_data(tmp_path)
    with pytest.raises(ConfigError, match=r"data.train: .*asr.json: is missing \(and 1 more\); --no-check-files"):
        check_files(config)
    write(config, tmp_path / "asr", "asr", [10], 5, predicts_frames=False)
    write(config, tmp_path / "tts", "tts", [10], 5, predicts_frames=True)
    check_files(config)
    named = dataclasses.replace(config, tokenizer=str(tmp_path / "t.model"), codec="nvidia/some-codec")
    with pytest.raises(ConfigError, match="tokenizer: .*t.model: is missing; --no-check-files"):
        check_files(named)
    with pytest.raises(ConfigError, match="codec: .*c.nemo: is missing;"):
        check_files(dataclasses.replace(config, codec=str(tmp_path / "c.nemo")))
    (tmp_path / "t.model").touch()
    training = dataclasses.replace(config.training, retention=RetentionConfig(data=str(tmp_path / "text.txt")))
    with pytest.raises(ConfigError, match="training.retention.data: .*text.txt: is missing; --no-check-files"):
        check_files(dataclasses.replace(config, training=training, tokenizer=str(tmp_path / "t.model")))
    start = dataclasses.replace(config.checkpoint, load=str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match="nothing: no such checkpoint directory"):
        check_files(dataclasses.replace(config, checkpoint=start, run_dir=str(tmp_path / "run")))
