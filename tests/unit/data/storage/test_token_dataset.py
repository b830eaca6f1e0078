"""Datasets on disk: documents come back unchanged, files are complete or absent, and errors name damaged files."""

import json
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_most.data.storage.documents import TASKS, Document
from megatron_most.data.storage.indexed import smallest_dtype
from megatron_most.data.storage.token_dataset import DatasetWriter, TokenDataset
from megatron_most.errors import DataError
from megatron_most.vocab import NO_CODE, VocabLayout
from tests.unit.data.tiny import LAYOUTS, example_document, layout, random_codes, write_dataset


def documents(task: str, layout_name: str) -> list[Document]:
    return [
        example_document(task, layout(layout_name), "fox" * (1 + i % 3), random_codes(1 + i, seed=i)) for i in range(6)
    ]


@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize("task", TASKS)
def test_documents_come_back_as_they_were(tmp_path, task, layout_name):
    written = documents(task, layout_name)
    with DatasetWriter(tmp_path / "data", task, layout(layout_name)) as writer:
        for document in written:
            writer.add(document)
        writer.commit({"tokenizer": {"fingerprint": "x"}})
    dataset = TokenDataset(tmp_path / "data")
    assert (dataset.task, dataset.vocab) == (task, layout(layout_name))
    assert dataset.provenance == {"tokenizer": {"fingerprint": "x"}}
    assert dataset.lengths.tolist() == [len(document) for document in written]
    for read, document in zip(dataset, written, strict=True):
        np.testing.assert_array_equal(read.ids, document.ids)
        np.testing.assert_array_equal(read.loss_mask, document.loss_mask)
        assert read.ids.dtype == np.int64 and read.loss_mask.dtype == bool
        if document.side_codes is None:
            assert read.side_codes is None
        else:
            np.testing.assert_array_equal(read.side_codes, document.side_codes)


def test_files_are_megatron_datasets_of_the_smallest_type(tmp_path):
    dataset = write_dataset(tmp_path / "data", "asr", 5)
    ids, mask, codes = (IndexedDataset(str(tmp_path / f"data.{part}")) for part in ("ids", "mask", "codes"))
    assert (ids.index.dtype, mask.index.dtype, codes.index.dtype) == (np.uint8, np.uint8, np.uint8)
    np.testing.assert_array_equal(ids[3], dataset.document(3).ids)
    frames = (dataset.document(3).ids == dataset.vocab.frame).sum()
    assert len(codes[3]) == frames * dataset.vocab.num_codebooks


@pytest.mark.parametrize(
    ("values", "dtype"),
    [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.int32), (2**31 + 1, np.int64)],
)
def test_the_smallest_type_holds_every_value(values, dtype):
    assert smallest_dtype(values) == dtype


def test_a_failed_build_leaves_nothing_and_spares_the_old_dataset(tmp_path):
    write_dataset(tmp_path / "data", "asr", 5)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError), DatasetWriter(tmp_path / "data", "asr", layout()) as writer:
        writer.add(documents("asr", "frame")[0])
        raise RuntimeError
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_its_sidecar_a_dataset_is_not_there(tmp_path):
    write_dataset(tmp_path / "data", "asr", 2)
    (tmp_path / "data.json").unlink()
    with pytest.raises(DataError, match=r"data\.json is missing \(not built, or not finished\)"):
        TokenDataset(tmp_path / "data")


@pytest.mark.parametrize("part", ["ids", "mask", "codes"])
def test_missing_and_truncated_parts_are_named(tmp_path, part):
    write_dataset(tmp_path / "data", "asr", 4)
    path = tmp_path / f"data.{part}.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"data\.{part}\.bin has \d+ bytes, the index needs \d+"):
        TokenDataset(tmp_path / "data")
    path.unlink()
    with pytest.raises(DataError, match=rf"data\.{part}\.bin is missing"):
        TokenDataset(tmp_path / "data")


@pytest.mark.parametrize("damage", [lambda index: b"nonsense" * 10, lambda index: index[:-8], lambda index: index[:20]])
def test_a_corrupt_index_is_named(tmp_path, damage):
    write_dataset(tmp_path / "data", "asr", 4)
    path = tmp_path / "data.ids.idx"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"data\.ids\.idx: not the index of a Megatron dataset, or damaged"):
        TokenDataset(tmp_path / "data")


def change(path: Path, position: int, value: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] = value
    path.write_bytes(content)


def test_an_id_outside_the_layout_is_named_with_document_and_offset(tmp_path):
    dataset = write_dataset(tmp_path / "data", "asr", 3)
    change(tmp_path / "data.ids.bin", int(dataset.lengths[0]) + 4, 250)
    dataset = TokenDataset(tmp_path / "data")
    dataset.document(0)
    with pytest.raises(DataError, match=r"data, document 1, offset 4: id 250 is outside the layout \(0\.\.42\)"):
        dataset.document(1)


def test_a_code_outside_its_codebook_is_named(tmp_path):
    write_dataset(tmp_path / "data", "asr", 3)
    change(tmp_path / "data.codes.bin", 1, 200)
    with pytest.raises(DataError, match="data, document 0: code 200 of codebook 1, frame 0 is outside 0..49"):
        TokenDataset(tmp_path / "data").document(0)


def test_codes_must_match_the_frames(tmp_path):
    dataset = write_dataset(tmp_path / "data", "asr", 3)
    first_frame = int(np.flatnonzero(dataset.document(0).ids == dataset.vocab.frame)[0])
    change(tmp_path / "data.ids.bin", first_frame, 5)
    with pytest.raises(DataError, match=r"document 0: \d+ codes for \d+ frames of 3"):
        TokenDataset(tmp_path / "data").document(0)


def test_a_sidecar_of_another_format_or_task_is_refused(tmp_path):
    write_dataset(tmp_path / "data", "asr", 2)
    sidecar = json.loads((tmp_path / "data.json").read_text())
    for key, value, rule in (("format", 99, "not of format 1"), ("task", "sing", "task='sing': must be one of")):
        (tmp_path / "data.json").write_text(json.dumps({**sidecar, key: value}))
        with pytest.raises(DataError, match=rule):
            TokenDataset(tmp_path / "data")
    (tmp_path / "data.json").write_text("{")
    with pytest.raises(DataError, match="not readable as JSON"):
        TokenDataset(tmp_path / "data")


def test_text_has_no_codes_in_either_layout(tmp_path):
    frame = write_dataset(tmp_path / "frame", "text_lm", 2)
    assert (frame.document(0).codes == NO_CODE).all() and not (tmp_path / "frame.codes.bin").exists()
    assert write_dataset(tmp_path / "flat", "text_lm", 2, layout_name="flat").document(0).codes is None


def test_an_older_dataset_with_codes_is_replaced_by_one_without(tmp_path):
    write_dataset(tmp_path / "data", "asr", 3)
    text = write_dataset(tmp_path / "data", "text_lm", 2)
    assert (text.document(1).side_codes == NO_CODE).all()


@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_documents_are_read_together_as_they_are_one_by_one(tmp_path, layout_name):
    dataset = write_dataset(tmp_path / "data", "tts", 6, layout_name=layout_name)
    together = dataset.read(np.array([4, 0, 4]))
    alone = [dataset.document(index) for index in (4, 0, 4)]
    assert dataset.lengths[[4, 0, 4]].tolist() == [len(document) for document in alone]
    np.testing.assert_array_equal(together.ids, np.concatenate([document.ids for document in alone]))
    np.testing.assert_array_equal(together.loss_mask, np.concatenate([document.loss_mask for document in alone]))
    if together.codes is not None:
        codes = np.concatenate([document.side_codes for document in alone])
        np.testing.assert_array_equal(together.codes, codes[(codes != NO_CODE).any(1)])


def test_input_positions_are_counted_by_modality(tmp_path):
    dataset = write_dataset(tmp_path / "data", "tts", 6)
    ids = np.concatenate([document.ids[:-1] for document in dataset])
    audio = int(dataset.vocab.is_audio(ids).sum())
    assert dataset.input_positions == {"text": len(ids) - audio, "audio": audio}


@pytest.mark.parametrize(("layout_name", "size"), [("frame", 256), ("frame_delay", 255), ("flat", 16)])
def test_codes_take_one_byte_where_they_fit(tmp_path, layout_name, size):
    vocab = VocabLayout(40, 2, size, layout_name)
    codes = np.array([[0, size - 1], [size - 1, 0]])
    with DatasetWriter(tmp_path / "data", "speech_lm", vocab) as writer:
        writer.add(example_document("speech_lm", vocab, "", codes))
        writer.commit({})
    part = "ids" if layout_name == "flat" else "codes"
    assert IndexedDataset(str(tmp_path / f"data.{part}")).index.dtype == np.uint8
    document = TokenDataset(tmp_path / "data").document(0)
    (segment,) = vocab.audio_segments(document.ids)
    side_codes = None if document.side_codes is None else document.side_codes[slice(*segment)]
    np.testing.assert_array_equal(vocab.codec_layout.decode(document.ids[slice(*segment)], side_codes), codes)


HEADER = 9 + 8 + 1 + 8 + 8


def test_damage_inside_an_index_is_named(tmp_path):
    """Its header fits its size: a length or a place is wrong, or the type of its values."""
    write_dataset(tmp_path / "data", "asr", 5)
    path = tmp_path / "data.ids.idx"
    whole = path.read_bytes()
    lengths = np.frombuffer(whole, np.int32, 5, HEADER)
    starts = np.frombuffer(whole, np.int64, 5, HEADER + 20)
    negative, moved, swapped = lengths.copy(), starts.copy(), starts.copy()
    negative[:2] = [lengths[0] + lengths[1] + 1, -1]
    moved[1] += 1
    swapped[[1, 2]] = swapped[[2, 1]]
    damages = {
        "its documents do not follow one another": [
            whole[:HEADER] + negative.tobytes() + whole[HEADER + 20 :],
            whole[: HEADER + 20] + moved.tobytes() + whole[HEADER + 60 :],
            whole[: HEADER + 20] + swapped.tobytes() + whole[HEADER + 60 :],
        ],
        "not the index of a Megatron dataset": [whole[:17] + bytes([kind]) + whole[18:] for kind in (0, 6, 7, 9, 255)],
    }
    for message, contents in damages.items():
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(DataError, match=message):
                TokenDataset(tmp_path / "data")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab", []),
        ("vocab", {"text_vocab_size": "x"}),
        ("provenance", 5),
        ("input_positions", {"text": 1}),
        ("input_positions", {"text": "x", "audio": -1}),
        ("input_positions", []),
    ],
)
def test_a_sidecar_of_wrong_types_is_refused(tmp_path, field, value):
    write_dataset(tmp_path / "data", "asr", 2)
    path = tmp_path / "data.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(DataError, match="broken sidecar") as caught:
        TokenDataset(tmp_path / "data")
    assert "\n" not in str(caught.value)
