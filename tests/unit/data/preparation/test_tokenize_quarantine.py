"""Audio that cannot be used is set aside with its line and its reason; every record is counted once."""

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

from megatron_most.audio.io import stream_audio
from megatron_most.data.preparation import tokenize_audio as module
from megatron_most.data.preparation.collect import SourceSpec
from megatron_most.data.preparation.encode_shard import utterances_of
from megatron_most.data.preparation.manifest import Record
from megatron_most.data.preparation.shards import Execution, Limits
from megatron_most.data.preparation.sources import Roots, SourceOptions
from megatron_most.data.preparation.tokenize_audio import tokenize_audio
from megatron_most.errors import DataError
from tests.unit.data.tiny import LoudnessCodec

RATE = 8000


@pytest.fixture(autouse=True)
def no_nemo(monkeypatch):
    monkeypatch.setattr(module, "load_codec", lambda name: LoudnessCodec())


def noise(num_samples: int) -> np.ndarray:
    return np.random.default_rng(num_samples).uniform(-0.5, 0.5, num_samples).astype(np.float32)


def bad_audio(folder: Path) -> dict[str, str]:
    """File -> a part of the reason that it cannot be used."""

    def write(name: str, samples: np.ndarray, **options) -> bytes:
        soundfile.write(folder / name, samples, RATE, **options)
        return (folder / name).read_bytes()

    folder.mkdir()
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("this is no audio")
    (folder / "raw.raw").write_bytes(bytes(1000))
    write("header.wav", noise(0))
    write("one.wav", noise(1))
    write("short.wav", noise(99))
    write("silence.wav", np.zeros(4000))
    write("hiss.wav", np.full(4000, 9e-5), subtype="FLOAT")
    write("nan.wav", np.where(np.arange(4000) == 3999, np.nan, noise(4000)), subtype="FLOAT")
    write("inf.wav", np.where(np.arange(4000) == 7, -np.inf, noise(4000)), subtype="FLOAT")
    write("scale.wav", noise(4000) * 30000, subtype="FLOAT")
    for name in ("cut.wav", "cut.flac", "cut.mp3", "cut.ogg"):
        content = write(name, noise(40000))
        (folder / name).write_bytes(content[: len(content) * 2 // 3])
    # A FLAC header has 36 bits for the number of samples, from the 21st byte on.
    content = bytearray(write("lying.flac", noise(40000)))
    content[21:26] = bytes([content[21] | 0x0F, 0xFF, 0xFF, 0xFF, 0xFF])
    (folder / "lying.flac").write_bytes(content)
    content = bytearray(write("less.wav", noise(8000)))
    at = content.index(b"data") + 4
    content[at : at + 4] = (9000).to_bytes(4, "little")
    (folder / "less.wav").write_bytes(content)
    content = bytearray(write("rate.wav", noise(4000)))
    content[24:28] = (7).to_bytes(4, "little")
    (folder / "rate.wav").write_bytes(content)
    write("other_length.wav", noise(8000))
    write("too_long.wav", noise(20 * RATE))
    return {
        "empty.wav": "not readable as audio",
        "text.wav": "not readable as audio",
        "raw.raw": "not readable as audio",
        "header.wav": "holds no audio samples",
        "one.wav": "1 samples at 8000 Hz; the codec needs 100",
        "short.wav": "99 samples at 8000 Hz; the codec needs 100",
        "silence.wav": "silence",
        "hiss.wav": "silence",
        "nan.wav": "not finite",
        "inf.wav": "not finite",
        "scale.wav": "they must be in -1..1",
        "cut.wav": "cut off",
        "cut.flac": "cut off",
        "cut.mp3": "cut off",
        "cut.ogg": "cut off",
        "lying.flac": "cut off: holds 40000 samples of the 68719476735",
        "less.wav": "its header tells of 9000 bytes of audio, 7000 bytes more follow",
        "rate.wav": "a rate of 7 Hz is outside 1000..768000 Hz",
        "other_length.wav": "holds 1.00 s, the manifest says 2.00 s",
        "too_long.wav": "longer than 10 s",
    }


@pytest.fixture
def hostile(tmp_path) -> tuple[SourceSpec, dict[str, str]]:
    """A manifest in which two good files stand among bad ones."""
    bad = bad_audio(tmp_path / "audio")
    lines = []
    for index, name in enumerate(["good0.wav", *bad, "good1.wav"]):
        if name not in bad:
            soundfile.write(tmp_path / "audio" / name, noise(4000 + index), RATE)
        entry = {"audio_filepath": f"audio/{name}", "text": name, "id": name}
        lines.append(json.dumps(entry | ({"duration": 2.0} if name == "other_length.wav" else {})))
    lines.append("{")
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    return SourceSpec("nemo", str(tmp_path / "m.jsonl")), bad


def test_bad_audio_is_set_aside_with_line_and_reason(hostile, tmp_path):
    spec, bad = hostile
    codes = tokenize_audio(
        spec, "codec", tmp_path / "codes", execution=Execution(2), limits=Limits(10.0), max_quarantine=0.95
    )
    assert [utterance.id for utterance in codes] == ["good0.wav", "good1.wav"]
    found = [json.loads(line) for line in (tmp_path / "codes.quarantine.jsonl").read_text().splitlines()]
    assert found.pop(0)["where"] == f"{tmp_path}/m.jsonl, line {len(bad) + 3}"
    for line, (entry, (name, reason)) in enumerate(zip(found, bad.items(), strict=True), start=2):
        assert (entry["where"], entry["id"]) == (f"{tmp_path}/m.jsonl, line {line}", name)
        assert reason in entry["reason"], entry
    counts = codes.provenance["counts"]
    assert counts["records"] == len(bad) + 3 == counts["tokenized"] + counts["quarantined"]
    assert (counts["tokenized"], counts["utterances"], counts["chunked"]) == (2, 2, 0)


def test_too_much_in_quarantine_is_an_error_that_a_higher_limit_lifts(hostile, tmp_path, monkeypatch):
    spec, bad = hostile
    run = {
        "source": spec,
        "codec": "codec",
        "output": tmp_path / "codes",
        "execution": Execution(1),
        "limits": Limits(10.0),
    }
    total, rejected = len(bad) + 3, len(bad) + 1
    with pytest.raises(DataError) as caught:
        tokenize_audio(**run, max_quarantine=0.5)
    assert f"{rejected} of {total} records are in quarantine, more than 50.00%" in str(caught.value)
    assert f"m.jsonl, line {total}: not JSON" in str(caught.value)
    assert len((tmp_path / "codes.quarantine.jsonl").read_text().splitlines()) == rejected
    assert not (tmp_path / "codes.json").exists()
    monkeypatch.setattr(module, "encode_all", lambda *_: None)  # nothing is left to encode
    assert len(tokenize_audio(**run, max_quarantine=0.95)) == 2


def test_nothing_but_quarantine_is_an_error(tmp_path):
    (tmp_path / "m.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"all of 1 records are in quarantine; the first: .*m\.jsonl, line 1: not JSON"):
        tokenize_audio(tmp_path / "m.jsonl", "codec", tmp_path / "codes", max_quarantine=1.0)
    shutil.rmtree(tmp_path / "codes.parts")
    with pytest.raises(DataError, match="1 of 1 records are in quarantine, more than 1.00%"):
        tokenize_audio(tmp_path / "m.jsonl", "codec", tmp_path / "codes")
    # Nothing was encoded, so nothing is kept that would bind the next try to the same source.
    assert {path.name for path in tmp_path.iterdir()} == {"m.jsonl", "codes.quarantine.jsonl"}


@pytest.mark.parametrize("rate", [8000, 11025])
def test_long_audio_becomes_chunks_and_loses_nothing(tmp_path, rate):
    soundfile.write(tmp_path / "long.wav", noise(round(7.3 * rate)), rate, subtype="FLOAT")
    (tmp_path / "m.jsonl").write_text('{"audio_filepath": "long.wav", "speaker": "p"}')
    spec = SourceSpec("nemo", str(tmp_path / "m.jsonl"), options=SourceOptions(needs_text=False))
    codes = tokenize_audio(spec, "codec", tmp_path / "codes", execution=Execution(1), limits=Limits(2.0))
    chunks = list(codes)
    assert [(chunk.id, chunk.text, chunk.chunk, chunk.speaker) for chunk in chunks] == [
        (f"m:1#{number}", "", (number, 4), "p") for number in range(4)
    ]
    [whole] = stream_audio(tmp_path / "long.wav", 8000)
    pieces = list(stream_audio(tmp_path / "long.wav", 8000, chunk=16000))
    np.testing.assert_allclose(np.concatenate(pieces), whole, atol=1e-5)
    for chunk, piece in zip(chunks, pieces, strict=True):
        np.testing.assert_array_equal(chunk.codes, LoudnessCodec().encode(piece))
    assert codes.provenance["counts"] | {"frames": 0} == {
        "records": 1, "tokenized": 1, "quarantined": 0, "chunked": 1, "utterances": 4, "frames": 0,
    }  # fmt: skip


def test_long_audio_with_a_text_is_chunked_only_when_asked_for(tmp_path):
    soundfile.write(tmp_path / "long.wav", noise(5 * RATE), RATE)
    (tmp_path / "m.jsonl").write_text('{"audio_filepath": "long.wav", "text": "a long story"}')
    with pytest.raises(DataError, match=r"longer than 2 s, .* \(--max-seconds, --chunk-transcribed\)"):
        tokenize_audio(tmp_path / "m.jsonl", "codec", tmp_path / "codes", execution=Execution(1), limits=Limits(2.0))
    limits = Limits(2.0, chunk_transcribed=True)
    chunks = list(
        tokenize_audio(tmp_path / "m.jsonl", "codec", tmp_path / "chunks", execution=Execution(1), limits=limits)
    )
    assert [(chunk.text, chunk.chunk) for chunk in chunks] == [("", (0, 3)), ("", (1, 3)), ("", (2, 3))]


def test_a_rest_that_is_too_short_for_the_codec_stays_with_the_last_chunk(tmp_path):
    soundfile.write(tmp_path / "long.wav", noise(4 * RATE + 99), RATE)
    record = Record("x", "", tmp_path / "long.wav", None, None)
    pieces = utterances_of(record, LoudnessCodec(), Roots([tmp_path]), Limits(2.0))
    assert [len(piece) for piece in pieces] == [2 * RATE, 2 * RATE + 99]


def test_a_rest_of_exactly_what_the_codec_needs_is_a_chunk_of_its_own(tmp_path):
    soundfile.write(tmp_path / "long.wav", noise(4 * RATE + LoudnessCodec.min_samples), RATE)
    record = Record("x", "", tmp_path / "long.wav", None, None)
    pieces = utterances_of(record, LoudnessCodec(), Roots([tmp_path]), Limits(2.0))
    assert [len(piece) for piece in pieces] == [2 * RATE, 2 * RATE, LoudnessCodec.min_samples]


@pytest.mark.slow
def test_ten_hours_are_never_held_at_once(tmp_path):
    hour = (noise(3600 * RATE) * 32767).astype(np.int16)
    with soundfile.SoundFile(tmp_path / "long.flac", "w", RATE, 1) as file:
        for _ in range(10):
            file.write(hour)
    del hour
    record = Record("x", "", tmp_path / "long.flac", None, None)
    tracemalloc.start()
    samples = sum(len(piece) for piece in utterances_of(record, LoudnessCodec(), Roots([tmp_path]), Limits()))
    assert samples == 36000 * RATE
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()


def test_a_link_that_leaves_the_roots_after_the_manifest_was_made_is_not_followed(tmp_path):
    soundfile.write(tmp_path / "outside.wav", noise(4000), RATE)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.wav").symlink_to("../outside.wav")
    record = Record("x", "t", tmp_path / "data" / "a.wav", None, None)
    with pytest.raises(DataError, match="lies outside of"):
        next(utterances_of(record, LoudnessCodec(), Roots([tmp_path / "data"]), Limits()))
