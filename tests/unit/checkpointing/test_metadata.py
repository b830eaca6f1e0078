"""Metadata of a checkpoint, and which configurations it fits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_most.checkpointing import directory as directories
from megatron_most.checkpointing.metadata import (
    METADATA,
    CheckpointMetadata,
    Fingerprint,
    check_same_data,
    check_same_model,
    first_difference,
    read_metadata,
)
from megatron_most.config import RunConfig
from megatron_most.data.storage.documents import Document
from megatron_most.data.storage.token_dataset import DatasetWriter
from megatron_most.errors import CheckpointError
from tests.distributed.tiny import tiny_config
from tests.unit.checkpointing.test_directory import make_checkpoint

THREE_AND_FIVE = "[{modality: text, size: 3, moe_router_topk: 2}, {modality: audio, size: 5, moe_router_topk: 2}]"


def metadata_of(config: RunConfig, **fields: Any) -> CheckpointMetadata:
    values = {
        "step": 3,
        "consumed_samples": 24,
        "consumed_tokens": 500,
        "config": dataclasses.asdict(config),
        "tokenizer": None,
        "codec": None,
        "world_size": 2,
        "pending": {},
        "versions": {},
        "datasets": [],
    }
    return CheckpointMetadata(**{**values, **fields})


def test_metadata_survives_json() -> None:
    metadata = metadata_of(
        tiny_config(),
        tokenizer=Fingerprint("t.model", "ab"),
        codec=Fingerprint("nvidia/codec", None),
        datasets=[Fingerprint("data/asr", "cd")],
    )
    read = CheckpointMetadata.from_dict(json.loads(json.dumps(metadata.to_dict())))
    assert read == metadata
    assert read.vocab == tiny_config().vocab


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model__hidden_size": 48}, "model.hidden_size is 48 in the checkpoint, 32 in the config"),
        ({"vocab__layout": "flat"}, "vocab.layout is 'flat' in the checkpoint, 'frame' in the config"),
        ({"model__moe__groups": THREE_AND_FIVE}, "model.moe.groups[0].size is 3 in the checkpoint, 4 in the config"),
        (
            {"model__moe__moe_router_bias_update_rate": 0.1},
            "moe_router_bias_update_rate is 0.1 in the checkpoint, 0.0 in the",
        ),
        ({"model__attention__rope__rotary_base": 5.0}, "model.attention.rope.rotary_base is 5.0 in the checkpoint"),
    ],
)
def test_another_model_is_refused_naming_both(overrides: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match="belongs to another model") as caught:
        check_same_model(Path("step_00000003"), metadata_of(tiny_config(**overrides)), tiny_config())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 3)
    values = metadata_of(tiny_config()).to_dict()
    (path / METADATA).write_text(json.dumps(values))
    directories.write_manifest(path, directories.checksum(path, directories.list_files(path)))
    assert read_metadata(path).format == 2
    # Before there was a number, experts were stored in the order of the job that wrote them.
    del values["format"]
    (path / METADATA).write_text(json.dumps({**values, "expert_order": list(range(8))}))
    directories.write_manifest(path, directories.checksum(path, directories.list_files(path)))
    with pytest.raises(CheckpointError, match="step_00000003: written in checkpoint format 1; this version reads"):
        read_metadata(path)


def test_what_is_of_training_or_of_the_layout_may_differ() -> None:
    groups = (
        "[{modality: text, size: 4, moe_router_topk: 2, moe_aux_loss_coeff: 0.3},"
        " {modality: audio, size: 4, moe_router_topk: 2}]"
    )
    other = tiny_config(
        seed=5,
        parallel__expert_model_parallel_size=2,
        model__moe__groups=groups,
        model__moe__moe_aux_loss_coeff=0.5,
        model__moe__orthogonality_coeff=0.5,
        model__moe__expert_order="contiguous",
        model__transformer_impl="portable",
        model__moe__expert_backend="sequential",
        model__moe__moe_shared_expert_overlap=True,
    )
    check_same_model(Path("step_00000003"), metadata_of(other), tiny_config())
    biased, slower = (tiny_config(model__moe__moe_router_bias_update_rate=rate) for rate in (1e-2, 1e-3))
    check_same_model(Path("step_00000003"), metadata_of(biased), slower)


def test_groups_by_size_are_those_by_lists_of_the_same_experts() -> None:
    """As conversion writes them, and as recipes do."""
    lists = (
        "[{{modality: text, experts: {}, moe_router_topk: 2}}, {{modality: audio, experts: {}, moe_router_topk: 2}}]"
    )
    halves = tiny_config(model__moe__groups=lists.format([0, 1, 2, 3], [4, 5, 6, 7]))
    check_same_model(Path("step_00000003"), metadata_of(halves), tiny_config())
    check_same_model(Path("step_00000003"), metadata_of(tiny_config()), halves)
    mixed = tiny_config(model__moe__groups=lists.format([0, 1, 2, 4], [3, 5, 6, 7]))
    with pytest.raises(
        CheckpointError, match=r"model.moe.groups\[0\].experts\[3\] is 4 in the checkpoint, 3 in the config"
    ):
        check_same_model(Path("step_00000003"), metadata_of(mixed), tiny_config())


def test_another_codec_is_refused_by_content_not_by_place(tmp_path: Path) -> None:
    (tmp_path / "codec.nemo").write_bytes(b"weights")
    config = tiny_config(codec=tmp_path / "codec.nemo")
    here = Fingerprint.of_codec(config)
    assert here is not None
    check_same_model(Path("step"), metadata_of(config, codec=Fingerprint("moved.nemo", here.fingerprint)), config)
    with pytest.raises(CheckpointError, match="belongs to another codec: other.nemo"):
        check_same_model(Path("step"), metadata_of(config, codec=Fingerprint("other.nemo", "0" * 64)), config)


def built_dataset(directory: Path, num_documents: int = 2, **provenance: Any) -> Fingerprint:
    vocab = tiny_config().vocab
    with DatasetWriter(directory / "notes", "text_lm", vocab) as writer:
        for _ in range(num_documents):
            ids = np.arange(1, 9)
            writer.add(Document(ids, np.ones(8, dtype=bool), np.empty(0, int), np.empty((0, vocab.num_codebooks), int)))
        writer.commit({"tokenizer": "t", "command": "build", "tool_version": "1", **provenance})
    (directory / "notes.more.ids.bin").write_bytes(b"of another dataset")
    return Fingerprint.of_dataset(str(directory / "notes"))


def test_a_dataset_is_known_by_what_it_was_built_from_and_its_sizes(tmp_path: Path) -> None:
    first = built_dataset(tmp_path)
    assert built_dataset(tmp_path) == first
    assert built_dataset(tmp_path, command="build again", tool_version="2") == first
    assert built_dataset(tmp_path, tokenizer="u") != first
    assert built_dataset(tmp_path, num_documents=3) != first


def test_a_dataset_with_other_content_is_refused_and_one_of_another_name_is_not() -> None:
    metadata = metadata_of(tiny_config(), datasets=[Fingerprint("data/asr", "ab"), Fingerprint("data/tts", "cd")])
    check_same_data(Path("step"), metadata, [Fingerprint("data/tts", "cd"), Fingerprint("data/new", "ef")])
    with pytest.raises(CheckpointError, match="step: dataset data/tts was rebuilt with other content"):
        check_same_data(Path("step"), metadata, [Fingerprint("data/asr", "ab"), Fingerprint("data/tts", "00")])


def test_broken_metadata_is_one_line(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 3)
    with pytest.raises(CheckpointError, match="written in checkpoint format 1"):
        read_metadata(path)
    (path / METADATA).write_text('{"step": 3, "format": 2}')
    directories.write_manifest(path, directories.checksum(path, directories.list_files(path)))
    with pytest.raises(CheckpointError, match="not the metadata of a checkpoint"):
        read_metadata(path)
    assert (path / METADATA).is_file()


def described(run_dir: Path, step: int, config: RunConfig, changes: dict[str, Any] | None = None) -> Path:
    """A checkpoint of ``config`` with its metadata, in which ``changes`` replace values."""
    path = make_checkpoint(run_dir, step)
    (path / METADATA).write_text(json.dumps({**metadata_of(config, step=step).to_dict(), **(changes or {})}, indent=2))
    directories.write_manifest(path, directories.checksum(path, directories.list_files(path)))
    return path


def test_no_flipped_bit_of_the_metadata_is_believed(tmp_path: Path) -> None:
    older, newer = (described(tmp_path, step, tiny_config()) for step in (3, 8))
    content = (newer / METADATA).read_bytes()
    for position in range(0, len(content), 7):
        for bit in (1, 0x80):
            damaged = bytearray(content)
            damaged[position] ^= bit
            (newer / METADATA).write_bytes(damaged)
            with pytest.raises(CheckpointError, match="corrupt: the content of checkpoint.json") as caught:
                read_metadata(tmp_path)
            assert f"to go on from {older}" in str(caught.value)
    (newer / METADATA).write_bytes(content)
    assert read_metadata(tmp_path).step == 8


def test_a_directory_of_another_step_is_refused(tmp_path: Path) -> None:
    described(tmp_path, 3, tiny_config()).rename(directories.step_directory(tmp_path, 9))
    with pytest.raises(CheckpointError, match="step_00000009: holds step 3, which is not the step in its name"):
        read_metadata(tmp_path)


def test_metadata_without_a_checksum_is_refused(tmp_path: Path) -> None:
    path = described(tmp_path, 3, tiny_config())
    directories.write_manifest(path, directories.checksum(path, ["state/shard"]))
    with pytest.raises(CheckpointError, match="manifest.json does not list checkpoint.json"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("changes", [{"config": []}, {"datasets": 3}, {"tokenizer": "x"}, {"step": "3"}])
def test_metadata_of_other_types_is_one_line(tmp_path: Path, changes: dict) -> None:
    path = described(tmp_path, 3, tiny_config(), changes)
    with pytest.raises(CheckpointError, match="not the metadata of a checkpoint"):
        read_metadata(path)


def test_first_difference_walks_in_order_and_skips_what_is_ignored() -> None:
    theirs, mine = {"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 5, "d": 4}}
    assert first_difference(theirs, mine, "x") == ("x.b.c", 2, 5)
    assert first_difference(theirs, mine, "x", ignore={"x.b.c"}) == ("x.b.d", 3, 4)
    assert first_difference(theirs, mine, "x", ignore={"x.b"}) is None
    assert first_difference({"a": 1, "old": 2}, {"a": 1}, "x") == ("x.old", 2, None)
    theirs, mine = {"a": [{"b": 1, "c": 2}, {"b": 3, "c": 4}]}, {"a": [{"b": 5, "c": 2}, {"b": 6, "c": 7}]}
    assert first_difference(theirs, mine, "x", ignore={"x.a[].b"}) == ("x.a[1].c", 4, 7)
    assert first_difference({"a": [1]}, {"a": [1, 2]}, "x") == ("x.a", [1], [1, 2])
