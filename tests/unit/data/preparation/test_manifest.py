"""Manifests: what is read, and one line with its number for what cannot be."""

import json

import numpy as np
import pytest
import soundfile

from megatron_most.data.preparation.manifest import manifest_records, read_manifest, read_waveform
from megatron_most.errors import DataError

GOOD = {"audio_filepath": "a.wav", "duration": 1.5, "text": "hello"}


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_fields_and_relative_paths(tmp_path):
    absolute = {**GOOD, "audio_filepath": "/audio/b.flac", "id": "b", "offset": 2, "text": "  Hällo  You "}
    records = read_manifest(write(tmp_path / "m.jsonl", GOOD, "", absolute))
    assert [record.id for record in records] == ["m:1", "b"]
    assert [str(record.audio) for record in records] == [str(tmp_path / "a.wav"), "/audio/b.flac"]
    assert [record.text for record in records] == ["hello", "Hällo  You"]
    assert [(record.offset, record.duration) for record in records] == [(None, 1.5), (2.0, 1.5)]


def test_text_needs_no_audio_where_none_is_asked_for(tmp_path):
    path = write(tmp_path / "m.jsonl", {"text": "only text"})
    assert read_manifest(path, needs_audio=False)[0].audio is None
    with pytest.raises(DataError, match=r"m\.jsonl, line 1: audio_filepath is missing"):
        read_manifest(path)


@pytest.mark.parametrize(
    ("bad", "rule"),
    [
        ("{", "not JSON"),
        ("[1]", "must be a JSON object"),
        ({**GOOD, "text": "   "}, "text='   ': must be a text that is not empty"),
        ({"audio_filepath": "a.wav"}, "text=None"),
        ({**GOOD, "audio_filepath": 3}, "audio_filepath=3: must be a path"),
        ({**GOOD, "duration": "long"}, "duration='long': must be a number"),
        ({**GOOD, "duration": 0}, "duration=0: must be greater than 0"),
        ({**GOOD, "offset": -1}, "offset=-1: must be a number"),
        ({**GOOD, "duration": float("nan")}, "duration=nan: must be a number"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, bad, rule):
    with pytest.raises(DataError, match="line 3: ") as caught:
        read_manifest(write(tmp_path / "m.jsonl", GOOD, "", bad))
    assert rule in str(caught.value) and str(tmp_path / "m.jsonl") in str(caught.value)


def test_only_a_newline_ends_a_line(tmp_path):
    texts = [f"before{separator}after" for separator in ("\u2028", "\u2029", "\x85")]
    lines = [json.dumps({**GOOD, "text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "m.jsonl").write_bytes("\r\n".join([*lines, ""]).encode())
    records = read_manifest(tmp_path / "m.jsonl")
    assert [record.text for record in records] == texts
    assert [record.id for record in records] == ["m:1", "m:2", "m:3"]


def test_ids_must_differ(tmp_path):
    with pytest.raises(DataError, match="line 2: id 'x' is already that of line 1"):
        read_manifest(write(tmp_path / "m.jsonl", {**GOOD, "id": "x"}, {**GOOD, "id": "x"}))


def test_a_manifest_is_read_line_by_line(tmp_path):
    records = manifest_records(write(tmp_path / "m.jsonl", GOOD, "{"))
    assert next(records).id == "m:1"  # before anybody has seen the second line
    with pytest.raises(DataError, match="line 2: not JSON"):
        next(records)


def test_empty_and_missing_manifests_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"m\.jsonl: empty manifest"):
        read_manifest(write(tmp_path / "m.jsonl", "", "  "))
    with pytest.raises(DataError, match=r"absent\.jsonl: no such manifest"):
        read_manifest(tmp_path / "absent.jsonl")


def test_audio_is_the_whole_file_or_the_segment(tmp_path):
    samples = np.random.default_rng(0).uniform(-1, 1, 8000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 8000, subtype="FLOAT")
    whole = {"audio_filepath": "a.wav", "text": "x", "duration": 1.0}
    records = read_manifest(write(tmp_path / "m.jsonl", whole, {**whole, "offset": 0.5, "duration": 0.25}))
    np.testing.assert_array_equal(read_waveform(records[0], 8000), samples)
    np.testing.assert_array_equal(read_waveform(records[1], 8000), samples[4000:6000])


def test_a_file_shorter_than_the_manifest_says_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(8000, dtype=np.float32), 8000)
    record = read_manifest(write(tmp_path / "m.jsonl", GOOD))[0]
    with pytest.raises(DataError, match=r"a\.wav: holds 1\.00 s, the manifest says 1\.50 s"):
        read_waveform(record, 8000)
