"""Frames that come one after another sound as they do together."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_most.audio.sound_stream import SoundStream, reach_of

SAMPLES = 40  # of a frame


class FilterCodec:
    """A frame's sound is a weighted sum of the waves of frames around it: ``taps[i]`` is that of ``i - ahead`` before.

    memory: share of the last sample that stays in the next, forever.
    """

    sample_rate, samples_per_frame, frame_rate = 400, SAMPLES, 10.0

    def __init__(
        self,
        taps: list[float],
        ahead: int = 0,
        memory: float = 0.0,
        num_codebooks: int = 2,
        codebook_size: int = 50,
    ) -> None:
        self.taps, self.ahead, self.memory = taps, ahead, memory
        self.num_codebooks, self.codebook_size = num_codebooks, codebook_size

    def encode(self, waveform: np.ndarray) -> np.ndarray:
        frames = np.pad(waveform, (0, -len(waveform) % SAMPLES)).reshape(-1, SAMPLES)
        return np.stack([(np.abs(frames).mean(1) * scale).astype(int) % 16 for scale in (10, 99)], axis=1)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        wave = np.sin(np.arange(SAMPLES) / 5)
        frames = np.cos(codes @ np.arange(1, codes.shape[1] + 1))[:, None] * wave
        total = np.zeros_like(frames)
        for place, tap in enumerate(self.taps):
            shift = place - self.ahead
            source = frames[max(0, -shift) : len(frames) - max(0, shift)]
            total[max(0, shift) : max(0, shift) + len(source)] += tap * source
        sound = total.reshape(-1)
        for place in range(1, len(sound) if self.memory else 0):
            sound[place] += self.memory * sound[place - 1]
        return sound.astype(np.float32)


def streamed(codec: FilterCodec, codes: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    stream, pieces, start = SoundStream(codec, codes.shape[1]), [], 0
    for size in sizes:
        pieces.append(stream.add(codes[start : start + size]))
        start += size
    return [*pieces, stream.finish()]


CODES = np.random.default_rng(1).integers(0, 50, (90, 2))


@pytest.mark.parametrize("sizes", [[1] * 90, [7, 0, 30, 1, 52], [90]], ids=["single", "uneven", "all"])
@pytest.mark.parametrize(("taps", "ahead"), [([1.0], 0), ([0.5, 0.3, 0.2], 0), ([0.2, 0.5, 0.3], 1), ([0.1] * 9, 4)])
def test_pieces_are_the_sound_of_the_whole(taps: list[float], ahead: int, sizes: list[int]) -> None:
    codec = FilterCodec(taps, ahead)
    reach = reach_of(codec, 2)
    assert (reach.before, reach.after, reach.is_exact) == (len(taps) - 1 - ahead, ahead, True)
    pieces = streamed(codec, CODES, sizes)
    np.testing.assert_allclose(np.concatenate(pieces), codec.decode(CODES), atol=1e-6)
    if ahead == 0:
        assert [len(piece) // SAMPLES for piece in pieces] == [*sizes, 0]  # nothing waits


def test_a_codec_that_never_forgets_meets_without_a_jump() -> None:
    """A memory of thousands of samples: pieces differ from the whole, but no more at their edges than elsewhere."""
    codec = FilterCodec([1.0], memory=0.9999)
    assert not reach_of(codec, 2).is_exact
    whole = codec.decode(CODES)
    found = np.concatenate(streamed(codec, CODES, [3] * 30))
    assert len(found) == len(whole)
    steps, expected = np.abs(np.diff(found)), np.abs(np.diff(whole))
    assert steps.max() < 1.5 * expected.max()  # without the blend it is more than 5 times as much


def test_a_codec_that_looks_far_ahead_waits_only_so_long() -> None:
    codec = FilterCodec([0.02] * 50, ahead=49)
    reach = reach_of(codec, 2)
    assert (reach.after, reach.is_exact) == (8, False)
    pieces = streamed(codec, CODES, [1] * 90)
    assert len(pieces[9]) == SAMPLES and sum(map(len, pieces)) == 90 * SAMPLES


def test_a_stream_that_goes_on_from_given_frames() -> None:
    codec = FilterCodec([0.5, 0.3, 0.2])
    stream = SoundStream(codec, 2, before=CODES[:40])
    found = np.concatenate([stream.add(CODES[40:41]), stream.add(CODES[41:]), stream.finish()])
    np.testing.assert_allclose(found, codec.decode(CODES)[40 * SAMPLES :], atol=1e-6)
