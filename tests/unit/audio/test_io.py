"""Reading and writing audio: any rate and channel count, and one clear line for what cannot be read."""

import io
import os

import numpy as np
import pytest
import soundfile

from megatron_most.audio import io as audio_io
from megatron_most.audio import read_audio, write_wav
from megatron_most.audio.io import stream_audio
from megatron_most.errors import DataError


def tone(rate: int, seconds: float = 1.0, frequency: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def strongest_frequency(waveform: np.ndarray, rate: int) -> float:
    return np.argmax(np.abs(np.fft.rfft(waveform))) * rate / len(waveform)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg"])
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 48000])
@pytest.mark.parametrize("channels", [1, 2])
def test_any_format_rate_and_channel_count(tmp_path, name, rate, channels):
    soundfile.write(tmp_path / name, np.repeat(tone(rate)[:, None], channels, axis=1), rate)
    waveform = read_audio(tmp_path / name, 16000)
    assert waveform.dtype == np.float32 and waveform.ndim == 1
    assert abs(len(waveform) - 16000) <= 1
    assert abs(strongest_frequency(waveform, 16000) - 440) <= 1
    assert abs(np.abs(waveform).max() - 0.5) < 0.05


def test_channels_are_averaged(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.stack([tone(16000), -tone(16000)], axis=1), 16000, subtype="FLOAT")
    assert np.abs(read_audio(tmp_path / "a.wav", 16000)).max() < 1e-6


def test_a_segment_is_what_the_whole_file_holds_there(tmp_path):
    noise = np.random.default_rng(0).uniform(-1, 1, 16000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", noise, 16000, subtype="FLOAT")
    segment = read_audio(tmp_path / "a.wav", 16000, offset=0.25, duration=0.5)
    np.testing.assert_array_equal(segment, noise[4000:12000])


def test_a_segment_beyond_the_end_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(16000), 16000)
    with pytest.raises(DataError, match=r"a\.wav: holds 0\.50 s from 0\.50 s on, 2\.00 s are expected"):
        read_audio(tmp_path / "a.wav", 16000, offset=0.5, duration=2.0)
    with pytest.raises(DataError, match="nothing at offset 3.00 s"):
        read_audio(tmp_path / "a.wav", 16000, offset=3.0)


def test_missing_corrupt_and_empty_files_are_named(tmp_path):
    (tmp_path / "corrupt.flac").write_bytes(b"fLaC" + bytes(100))
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, dtype=np.float32), 16000)
    not_numbers = tone(16000)
    not_numbers[77] = np.nan
    soundfile.write(tmp_path / "nan.wav", not_numbers, 16000, subtype="FLOAT")
    for name, rule in (
        ("absent.wav", "no such audio file"),
        ("corrupt.flac", "not readable as audio"),
        ("empty.wav", "holds"),
        ("nan.wav", "not finite"),
    ):
        with pytest.raises(DataError, match=rule) as caught:
            read_audio(tmp_path / name, 16000)
        assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_a_file_that_was_cut_off_is_refused(tmp_path, name, share):
    soundfile.write(tmp_path / name, np.random.default_rng(0).uniform(-0.5, 0.5, 40000), 16000)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError, match=rf"{name}: .*\w\.?$"):
        read_audio(tmp_path / name, 16000)


def test_an_error_that_libsndfile_cannot_name_still_says_something(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.flac", tone(16000), 16000)
    error = soundfile.LibsndfileError(158)
    monkeypatch.setattr(type(error), "error_string", property(lambda self: ""))
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(DataError, match=r"a\.flac: not readable as audio: broken or cut off$"):
        read_audio(tmp_path / "a.flac", 16000)


@pytest.mark.parametrize("size", [0x7FFFF000, 0xFFFFFFFF])
def test_wav_from_a_pipe_does_not_know_its_size(tmp_path, size):
    soundfile.write(tmp_path / "a.wav", tone(16000), 16000)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    at = content.index(b"data") + 4
    content[at : at + 4] = size.to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(content)
    assert len(read_audio(tmp_path / "a.wav", 16000)) == 16000


@pytest.mark.parametrize("after", [b"LIST" + (40000).to_bytes(4, "little") + bytes(40000), bytes(512)])
def test_wav_may_hold_other_things_after_its_audio(tmp_path, after):
    soundfile.write(tmp_path / "a.wav", tone(16000, 0.1), 16000)
    content = bytearray((tmp_path / "a.wav").read_bytes()) + after
    content[4:8] = (len(content) - 8).to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(content)
    assert len(read_audio(tmp_path / "a.wav", 16000)) == 1600


def test_what_is_written_is_read_back_and_clipped(tmp_path):
    waveform = tone(16000) * 3
    write_wav(tmp_path / "new" / "a.wav", waveform, 16000)
    read = read_audio(tmp_path / "new" / "a.wav", 16000)
    np.testing.assert_allclose(read, np.clip(waveform, -1, 1), atol=1e-4)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.wav"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_wav(tmp_path / "a.wav", tone(16000), 16000)
    before = (tmp_path / "a.wav").read_bytes()
    with pytest.raises(TypeError):
        write_wav(tmp_path / "a.wav", tone(16000), "not a rate")
    assert (tmp_path / "a.wav").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


@pytest.mark.parametrize(("name", "subtype"), [("a.mp3", "MPEG_LAYER_III"), ("a.ogg", "VORBIS"), ("a.opus", "OPUS")])
@pytest.mark.parametrize("channels", [1, 2])
def test_lossy_formats_are_read_whole_and_cut_off_ones_refused(tmp_path, name, subtype, channels):
    path = tmp_path / name
    audio_format = "MP3" if name.endswith("mp3") else "OGG"
    samples = np.repeat(tone(48000, 2.0)[:, None], channels, axis=1)
    soundfile.write(path, samples, 48000, format=audio_format, subtype=subtype)
    waveform = read_audio(path, 16000)
    assert len(waveform) == 32000 and abs(strongest_frequency(waveform, 16000) - 440) <= 1
    whole = path.read_bytes()
    for share in (0.4, 0.7, 0.95):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(DataError, match=rf"{name}: (cut off|not readable as audio)"):
            read_audio(path, 16000)


def test_one_channel_can_be_chosen(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.stack([tone(16000), tone(16000, frequency=880)], axis=1), 16000)
    for channel, frequency in ((0, 440), (1, 880)):
        assert abs(strongest_frequency(read_audio(tmp_path / "a.wav", 16000, channel=channel), 16000) - frequency) <= 1
    with pytest.raises(DataError, match="has 2 channels, channel 2 is asked for"):
        read_audio(tmp_path / "a.wav", 16000, channel=2)


@pytest.mark.parametrize(("rate", "sample_rate"), [(16000, 16000), (44100, 16000), (8000, 22050)])
def test_a_stream_is_the_same_audio_in_pieces(tmp_path, rate, sample_rate):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, round(rate * 3.3)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", noise, rate, subtype="FLOAT")
    whole = read_audio(tmp_path / "a.wav", sample_rate)
    pieces = list(stream_audio(tmp_path / "a.wav", sample_rate, chunk=sample_rate))
    assert [len(piece) for piece in pieces] == [sample_rate] * 3 + [len(whole) - 3 * sample_rate]
    np.testing.assert_allclose(np.concatenate(pieces), whole, atol=1e-5)
    [single] = stream_audio(tmp_path / "a.wav", sample_rate, chunk=len(whole) + 1)
    np.testing.assert_array_equal(single, whole)


def test_an_open_file_is_read_as_a_named_one(tmp_path):
    for name in ("a.wav", "a.flac", "a.ogg"):
        soundfile.write(tmp_path / name, tone(16000), 16000)
        content = io.BytesIO((tmp_path / name).read_bytes())
        np.testing.assert_array_equal(read_audio(content, 16000), read_audio(tmp_path / name, 16000))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.wav")
    with pytest.raises(DataError, match=r"a\.wav: not a regular file"):
        read_audio(tmp_path / "a.wav", 16000)


def test_an_ogg_file_cut_off_between_two_pages_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.ogg", np.random.default_rng(0).uniform(-0.5, 0.5, 160000), 16000, subtype="VORBIS")
    whole = (tmp_path / "a.ogg").read_bytes()
    (tmp_path / "a.ogg").write_bytes(whole[: whole.rindex(b"OggS")])
    with pytest.raises(DataError, match=r"a\.ogg: cut off: the end of the Ogg stream is missing"):
        read_audio(tmp_path / "a.ogg", 16000)


def test_more_than_fits_in_memory_is_refused_and_streamed(tmp_path, monkeypatch):
    """A small file can hold days: what is read whole has a bound, at the rate of the file or of the result."""
    monkeypatch.setattr(audio_io, "MAX_SAMPLES", 16000)
    for rate in (8000, 16000, 48000):
        seconds = 16000 / max(rate, 16000)
        sound = np.zeros(round(rate * seconds) + 1, dtype=np.float32)
        soundfile.write(tmp_path / "long.flac", sound, rate)
        with pytest.raises(DataError, match=r"long\.flac: longer than 0\.0 h; read parts of it"):
            read_audio(tmp_path / "long.flac", 16000)
        assert len(read_audio(tmp_path / "long.flac", 16000, duration=seconds)) == round(16000 * seconds)
        assert len(list(stream_audio(tmp_path / "long.flac", 16000, chunk=4000))) > 1


def test_a_chunk_of_less_than_its_own_header_is_refused(tmp_path):
    """Such a length led back to the chunk itself, for ever."""
    soundfile.write(tmp_path / "a.w64", np.zeros(100, dtype=np.float32), 16000, format="W64")
    content = bytearray((tmp_path / "a.w64").read_bytes())
    place = content.index(b"fmt ") + 16
    content[place : place + 8] = bytes(8)
    (tmp_path / "a.w64").write_bytes(content)
    with pytest.raises(DataError, match="damaged: a chunk of -24 bytes"):
        read_audio(tmp_path / "a.w64", 16000)
