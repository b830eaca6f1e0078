"""Files whose header does not tell their length, or tells a wrong one, are read to their end or refused."""

import io
import os

import numpy as np
import pytest
import soundfile

from megatron_most.audio import read_audio
from megatron_most.audio.containers import Stream, StreamView, streams_of
from megatron_most.audio.io import stream_audio
from megatron_most.audio.mp3 import mp3_streams
from megatron_most.errors import DataError

RATE = 16000


def speech(seconds: float = 2.0, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """A tone that gets louder and noisier, so that a variable bit rate varies."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, len(time))
    return ((time / seconds) ** 2 * (0.3 * np.sin(2 * np.pi * 300 * time) + 0.5 * noise)).astype(np.float32)


def encoded(waveform: np.ndarray, rate: int = RATE, **options) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, rate, **options)
    return buffer.getvalue()


def mp3(mode: str = "CONSTANT", seed: int = 0, rate: int = RATE) -> bytes:
    return encoded(speech(seed=seed, rate=rate), rate, format="MP3", bitrate_mode=mode, compression_level=0.7)


def without_table(content: bytes) -> tuple[bytes, int]:
    """An MP3 file as it comes out of a pipe, and its number of frames."""
    [stream] = mp3_streams(io.BytesIO(content), "a")
    assert stream.table is not None
    return content[stream.table.stop :], stream.num_frames


def read(content: bytes, rate: int = RATE, **options) -> np.ndarray:
    return read_audio(io.BytesIO(content), rate, **options)


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize("rate", [RATE, 44100])
@pytest.mark.parametrize("tag", [b"", b"ID3\4\0\0\0\0\0\x05hello", b"ID3\4\0\0\0\0\0\0" * 2 + bytes(99)])
def test_mp3_without_a_length_is_read_to_its_last_frame(mode, rate, tag):
    whole = mp3(mode, rate=rate)
    piped, num_frames = without_table(whole)
    found, expected = read(tag + piped + b"TAG".ljust(128), rate), read(whole, rate)
    samples_per_frame = 576 if rate == RATE else 1152
    assert len(found) == num_frames * samples_per_frame
    # The table also tells how much the encoder put before the sound.
    late = len(expected) // 2
    loud = expected[late : late + 2000]
    delay = next(at for at in range(3000) if np.allclose(found[late + at :][:2000], loud, atol=1e-4))
    np.testing.assert_allclose(found[delay : delay + len(expected)], expected, atol=1e-4)


def test_a_table_of_the_other_kind_counts_too():
    """Fraunhofer's encoder writes VBRI tables, at one place whatever the channels."""
    whole = mp3()
    [stream] = mp3_streams(io.BytesIO(whole), "a")
    table = bytearray(stream.table.stop - stream.table.start)
    table[:4] = whole[stream.table.start :][:4]
    table[36:54] = b"VBRI" + bytes(10) + stream.num_frames.to_bytes(4, "big")
    piped, _ = without_table(whole)
    np.testing.assert_array_equal(read(bytes(table) + piped), read(piped))
    table[50:54] = (stream.num_frames + 2).to_bytes(4, "big")
    with pytest.raises(DataError, match="cut off: holds"):
        read(bytes(table) + piped)


def test_mp3_that_ends_within_a_frame_or_lacks_some_is_refused():
    whole = mp3()
    piped, _ = without_table(whole)
    with pytest.raises(DataError, match="cut off: 100 bytes of the last MP3 frame are missing"):
        read(piped[:-100])
    last = mp3_streams(io.BytesIO(whole), "a")[0].frames[-1].stop
    few = whole[: last * 6 // 10]
    end = next(at for at in range(len(few), 0, -1) if few[at - 1 :].startswith(b"\xff") and _is_whole(few[: at - 1]))
    with pytest.raises(DataError, match=r"cut off: holds \d+ MP3 frames of \d+"):
        read(few[: end - 1])
    with pytest.raises(DataError, match="damaged: no MP3 frame in 4097 bytes from byte"):
        read(piped + bytes(5000))


def _is_whole(content: bytes) -> bool:
    try:
        mp3_streams(io.BytesIO(content), "a")
    except DataError as error:
        return "MP3 frames of" in str(error)
    return True


def test_joined_mp3_files_are_read_one_after_the_other():
    first, second = mp3(), mp3("VARIABLE", seed=1)
    joined = np.concatenate([read(first), read(second)])
    np.testing.assert_allclose(read(first + second), joined, atol=1e-6)
    piped, num_frames = without_table(first)
    assert len(read(piped + piped)) == 2 * num_frames * 576
    assert len(read(piped + second)) == num_frames * 576 + len(read(second))
    assert len(read(first + mp3(seed=2, rate=44100))) == len(read(first)) + 2 * RATE


@pytest.mark.parametrize("said", [0, 1000, 31999])
def test_flac_that_says_less_than_it_holds_is_read_to_its_end(said):
    whole = encoded(speech(), format="FLAC")
    assert _with_total(whole, 32000) == whole
    np.testing.assert_array_equal(read(_with_total(whole, said)), read(whole))
    segment = read(_with_total(whole, said), offset=1.5)
    np.testing.assert_array_equal(segment, read(whole)[24000:])
    with pytest.raises(DataError, match="cut off: "):
        read(_with_total(whole, said)[:-700])


@pytest.mark.parametrize("extra", [16, 17, 300, 767, 4095])
def test_flac_whose_last_frame_is_short_and_silent_is_whole(extra):
    """Such a frame has 11 or 12 bytes; the frame before it ends where the header does not say."""
    waveform = np.concatenate([speech(8192 / RATE), np.zeros(extra, dtype=np.float32)])
    content = encoded(waveform, format="FLAC")
    np.testing.assert_array_equal(read_audio(io.BytesIO(content), RATE), soundfile.read(io.BytesIO(content))[0])


def test_flac_that_says_more_than_it_holds_is_refused():
    whole = encoded(speech(), format="FLAC")
    with pytest.raises(DataError, match="cut off: holds 32000 samples of the 32001"):
        read(_with_total(whole, 32001))


def _with_total(flac: bytes, total: int) -> bytes:
    field = int.from_bytes(flac[18:26], "big") >> 36 << 36 | total
    return flac[:18] + field.to_bytes(8, "big") + flac[26:]


@pytest.mark.parametrize("options", [{"format": "FLAC"}, {"format": "OGG", "subtype": "VORBIS"}])
def test_a_chain_of_streams_is_read_to_its_last_one(tmp_path, options):
    parts = [encoded(speech(seed=seed, rate=rate), rate, **options) for seed, rate in ((0, RATE), (1, 8000))]
    expected = np.concatenate([read(part) for part in parts])
    (tmp_path / "a").write_bytes(b"".join(parts))
    np.testing.assert_allclose(read_audio(tmp_path / "a", RATE), expected, atol=1e-6)
    # A segment over the joint, one behind it, and pieces.
    np.testing.assert_allclose(read_audio(tmp_path / "a", RATE, offset=1.0, duration=0.5), expected[16000:24000])
    assert len(read_audio(tmp_path / "a", RATE, offset=1.5, duration=1.0)) == 16000
    assert len(read_audio(tmp_path / "a", RATE, offset=2.5, duration=1.0)) == 16000
    pieces = list(stream_audio(tmp_path / "a", RATE, chunk=10000))
    assert [len(piece) for piece in pieces] == [10000] * 6 + [4000]
    np.testing.assert_allclose(np.concatenate(pieces), expected, atol=1e-4)
    with pytest.raises(DataError, match=r"holds 4\.00 s, nothing at offset 4\.50 s"):
        read_audio(tmp_path / "a", RATE, offset=4.5)


def test_a_file_is_counted_again_after_it_was_edited(tmp_path):
    (tmp_path / "a").write_bytes(encoded(speech(), format="FLAC"))
    assert len(read_audio(tmp_path / "a", RATE)) == 32000
    (tmp_path / "a").write_bytes(encoded(speech(1.0), format="FLAC"))
    os.utime(tmp_path / "a", (1, 1))
    assert len(read_audio(tmp_path / "a", RATE)) == 16000


@pytest.mark.parametrize("seconds", [1.0, 2.0])
def test_gsm_which_cannot_seek_is_read(tmp_path, seconds):
    soundfile.write(tmp_path / "a.wav", speech(seconds, 8000), 8000, format="WAV", subtype="GSM610")
    whole = read_audio(tmp_path / "a.wav", 8000)
    assert 0 <= len(whole) - 8000 * seconds <= 320  # of whole blocks
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav", 8000, offset=0.5, duration=0.25), whole[4000:6000])


CHUNKED = {"WAV": 0, "RF64": 0, "AIFF": 0, "W64": 24, "CAF": 0}
"""Format -> bytes that the length of the audio counts beside it."""


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize("unknown", [0x00, 0xFF])
def test_a_container_from_a_pipe_is_read_to_its_end(name, unknown):
    whole = encoded(speech(), format=name)
    key = b"SSND" if name == "AIFF" else b"data"
    at = whole.index(key) + (16 if name == "W64" else 4)
    size = 8 if name in ("W64", "CAF") else 4
    length = bytes([unknown]) * size
    if name == "W64" and unknown:
        length = length[:-1] + b"\x7f"  # a number with a sign
    piped = whole[:at] + length + whole[at + size :]
    if name == "RF64":
        ds64 = whole.index(b"ds64") + 8
        piped = piped[:ds64] + bytes(24) + piped[ds64 + 24 :]
    np.testing.assert_array_equal(read(piped), read(whole))


@pytest.mark.parametrize("name", [*CHUNKED, "AU"])
def test_a_container_that_was_cut_off_is_refused(name):
    whole = encoded(speech(), format=name)
    with pytest.raises(DataError, match="cut off: 9000 of 6400[0-9] bytes of audio are missing|cut off: 9000 of 640"):
        read(whole[:-9000] if name != "CAF" else whole[: whole.index(b"data") + 16 + 64000 - 9000])
    assert len(read(whole)) == 32000


@pytest.mark.parametrize("content", [b"RIFF\0\0\0\0WAVEdata\xff\xff\xff\x7e", b"fLaC" + bytes(80), b"OggS" + bytes(99)])
def test_headers_without_audio_are_one_line(content):
    with pytest.raises(DataError, match="audio: "):
        read(content)


def test_a_view_is_a_file_of_its_own(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(100)))
    with open(tmp_path / "a", "rb") as file:
        view = StreamView(file, Stream((b"head", range(10, 20), b"-", range(90, 100))))
        assert view.seek(0, os.SEEK_END) == 25
        for start in range(25):
            view.seek(start)
            assert view.read() == (b"head" + bytes(range(10, 20)) + b"-" + bytes(range(90, 100)))[start:]
        assert view.seek(30) == 30 and view.read(5) == b""


def test_a_file_of_another_kind_is_one_stream():
    assert streams_of(io.BytesIO(b"what is this"), "a") == [Stream((range(12),))]
