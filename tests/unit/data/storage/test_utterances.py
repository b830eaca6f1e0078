"""A validation set that holds an utterance of a training set is refused, whatever it was built for."""

from pathlib import Path

import numpy as np
import pytest

from megatron_most.config import DataConfig, DatasetConfig
from megatron_most.data.storage.codes import CodesDataset
from megatron_most.data.storage.utterances import require_disjoint, write_utterances
from megatron_most.errors import ConfigError, DataError
from tests.unit.data.tiny import random_codes, write_codes


def dataset(folder: Path, name: str, *utterances: tuple[str, int, int]) -> DatasetConfig:
    """Of utterances of an id, a number of frames and a seed."""
    write_codes(folder / f"{name}_codes", [(i, "fox", random_codes(frames, seed)) for i, frames, seed in utterances])
    write_utterances(folder / name, [CodesDataset(folder / f"{name}_codes")])
    return DatasetConfig(str(folder / name))


def check(train: list[DatasetConfig], validation: list[DatasetConfig]) -> None:
    data = DataConfig(seq_length=64)
    data.train, data.validation = train, validation
    require_disjoint(data)


@pytest.mark.parametrize(
    ("utterances", "shared"),
    [
        ([("c", 5, 2), ("d", 6, 3)], 0),
        ([("a", 5, 9), ("d", 6, 3)], 1),  # another device's codes of the same utterance
        ([("c", 5, 0), ("d", 6, 1)], 2),  # under other ids
        ([("a", 6, 9)], 0),  # ids of manifests are often numbers of lines
    ],
)
def test_an_utterance_is_known_by_its_id_and_length_or_by_its_audio(tmp_path, utterances, shared):
    train = [dataset(tmp_path, "other", ("x", 9, 9)), dataset(tmp_path, "train", ("a", 5, 0), ("b", 6, 1))]
    validation = [dataset(tmp_path, "heldout", *utterances)]
    if not shared:
        check(train, validation)
        return
    rule = rf"heldout shares {shared} of its {len(utterances)} utterances with .*/train of data\.train"
    with pytest.raises(ConfigError, match=rule):
        check(train, validation)


def test_datasets_that_do_not_say_are_not_compared(tmp_path):
    check([DatasetConfig(str(tmp_path / "a"))], [DatasetConfig(str(tmp_path / "a"))])


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY nonsense"])
def test_a_broken_list_is_named(tmp_path, damage):
    entry = dataset(tmp_path, "train", ("a", 5, 0))
    (tmp_path / "train.utterances.npy").write_bytes(damage)
    with pytest.raises(DataError, match=r"train\.utterances\.npy: "):
        check([entry], [])
    np.save(tmp_path / "train.utterances.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"train\.utterances\.npy: holds float64 \[3\]"):
        check([entry], [])
