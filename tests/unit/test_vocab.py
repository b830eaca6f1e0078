"""The id space and its modalities; ids and codes outside their ranges are named, not used."""

import json

import numpy as np
import pytest
import torch

from megatron_most.errors import ConfigError, DataError
from megatron_most.vocab import VocabLayout

FRAME = VocabLayout(text_vocab_size=50, num_codebooks=3, codebook_size=10, layout="frame")
FLAT = VocabLayout(text_vocab_size=50, num_codebooks=3, codebook_size=10, layout="flat")


def test_the_id_space_is_text_then_special_then_codes():
    assert (FLAT.begin_of_audio, FLAT.end_of_audio, FLAT.frame) == (50, 51, 52)
    assert FRAME.size == 53
    assert FLAT.size == 53 + 30
    assert VocabLayout(**(FRAME.to_dict() | {"layout": "frame_delay"})).size == 54  # and the tail


@pytest.mark.parametrize("vocab", [FRAME, FLAT])
def test_modality_of_an_id_is_the_same_in_numpy_and_torch(vocab):
    ids = np.arange(vocab.size)
    assert vocab.is_audio(ids).sum() == vocab.size - 50
    assert vocab.is_audio(torch.from_numpy(ids)).tolist() == vocab.is_audio(ids).tolist()


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((2, 5)), r"a.wav: codes have shape \[2, 5\], expected \[frames, 3\]"),
        (np.zeros(5), "a.wav: codes have shape"),
        (np.array([[0, 2, 0], [1, 10, 0]]), r"a.wav: code 10 of codebook 1, frame 1 is outside 0\.\.9"),
        (np.array([[0, 2, -1], [1, 3, 0]]), "a.wav: code -1 of codebook 2, frame 0"),
    ],
)
def test_codes_outside_their_codebook_are_named(codes, message):
    with pytest.raises(DataError, match=message):
        FRAME.check_codes(codes, "a.wav")
    FRAME.check_codes(np.full((4, 3), 9), "a.wav")


@pytest.mark.parametrize(("bad", "offset"), [(53, 2), (-1, 0)])
def test_ids_outside_the_layout_are_named(bad, offset):
    ids = np.zeros(4, dtype=np.int64)
    ids[offset] = bad
    with pytest.raises(DataError, match=rf"train, document 7, offset {offset}: id {bad} is outside the layout"):
        FRAME.check_ids(ids, "train, document 7")
    FRAME.check_ids(np.arange(53), "train, document 7")


def test_layouts_compare_field_by_field():
    assert FRAME.describe_difference(VocabLayout(**FRAME.to_dict())) is None
    assert FRAME.describe_difference(FLAT) == "layout: frame != flat"
    other = VocabLayout(51, 3, 11)
    assert FRAME.describe_difference(other) == "text_vocab_size: 50 != 51, codebook_size: 10 != 11"


@pytest.mark.parametrize("field", ["text_vocab_size", "num_codebooks", "codebook_size"])
def test_an_empty_layout_is_refused(field):
    values = FRAME.to_dict() | {field: 0}
    with pytest.raises(ConfigError, match=f"vocab.{field}=0: must be at least 1"):
        VocabLayout(**values)
    with pytest.raises(ConfigError, match="vocab.layout='delay': must be one of frame, frame_delay, flat"):
        VocabLayout(**(FRAME.to_dict() | {"layout": "delay"}))


IMAGE = {"name": "image", "start": 20, "stop": 30}
CODE = {"name": "code", "start": 40, "stop": 50}


def test_further_modalities_are_ranges_of_text_ids():
    vocab = VocabLayout(50, 3, 10, further_modalities=[CODE, IMAGE])
    assert vocab.modality_names == ("text", "audio", "code", "image")
    ids = np.arange(vocab.size)
    expected = [0] * 20 + [3] * 10 + [0] * 10 + [2] * 10 + [1] * 3
    assert vocab.modality_of(ids).tolist() == expected
    assert vocab.modality_of(torch.from_numpy(ids)).tolist() == expected
    assert vocab.size == FRAME.size


def test_a_layout_survives_json_and_differs_in_its_modalities():
    vocab = VocabLayout(50, 3, 10, further_modalities=[IMAGE])
    read = VocabLayout(**json.loads(json.dumps(vocab.to_dict())))
    assert read == vocab
    assert read.describe_difference(vocab) is None
    assert VocabLayout(50, 3, 10).describe_difference(vocab) == "further_modalities: none != image 20..30"
    # Files from before there were further modalities name none.
    older = {name: value for name, value in FRAME.to_dict().items() if name != "further_modalities"}
    assert VocabLayout(**older) == FRAME


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{**IMAGE, "stop": 51}], r"further_modalities\[image\]=20\.\.51: must be a range of the 50 text ids"),
        ([{**IMAGE, "stop": 20}], "must be a range"),
        ([IMAGE, {**CODE, "start": 29}], r"\[code\]=29\.\.50: overlaps another"),
        ([IMAGE, {**CODE, "name": "image"}], "names must differ, got text, audio, image, image"),
        ([{**IMAGE, "name": "audio"}], "names must differ"),
        ([{**IMAGE, "name": "common"}], "name 'common' must be a word other than common, rest"),
        ([{**IMAGE, "name": "a/b"}], "name 'a/b' must be a word"),
    ],
)
def test_modalities_that_cannot_be_are_refused(entries, message):
    with pytest.raises(ConfigError, match=message):
        VocabLayout(50, 3, 10, further_modalities=entries)
