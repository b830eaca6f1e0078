"""Codec layouts turn codes into positions and back, and say what may come next, for any number of codebooks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_most.codec_layouts import CODEC_LAYOUTS, NO_CODE
from megatron_most.errors import ConfigError, DataError
from megatron_most.vocab import VocabLayout

DELAYED = ("frame_delay", "flat_delay")


def vocab_of(layout: str, num_codebooks: int = 3, codebook_size: int = 10) -> VocabLayout:
    return VocabLayout(text_vocab_size=50, num_codebooks=num_codebooks, codebook_size=codebook_size, layout=layout)


@st.composite
def layouts_and_codes(draw):
    name = draw(st.sampled_from(sorted(CODEC_LAYOUTS)))
    codebooks, frames = draw(st.integers(2 if name in DELAYED else 1, 6)), draw(st.integers(0, 12))
    vocab = VocabLayout(draw(st.integers(1, 500)), codebooks, draw(st.integers(1, 40)), name)
    values = st.lists(st.integers(0, vocab.codebook_size - 1), min_size=codebooks * frames, max_size=codebooks * frames)
    return vocab, np.array(draw(values), dtype=np.int64).reshape(frames, codebooks)


@given(layouts_and_codes())
def test_decoding_undoes_encoding(case):
    vocab, codes = case
    layout = vocab.codec_layout
    ids, side_codes = layout.encode(codes)
    assert ids.shape == (layout.num_positions(len(codes)),)
    assert side_codes.shape == (ids.size, vocab.num_codebooks)
    assert vocab.is_audio(ids).all()
    vocab.check_ids(ids, "here")
    assert (side_codes == NO_CODE).all() or layout.uses_side_codes
    assert (side_codes[~layout.holds_side_codes(ids)] == NO_CODE).all()
    assert (side_codes != NO_CODE).all() or layout.is_delayed or not layout.uses_side_codes
    assert layout.is_leading(ids).sum() == len(codes)
    np.testing.assert_array_equal(layout.decode(ids, side_codes), codes)


@given(layouts_and_codes())
def test_the_ids_of_a_segment_and_its_end_are_exactly_what_is_allowed(case):
    vocab, codes = case
    layout = vocab.codec_layout
    ids, side_codes = layout.encode(codes)
    for position, token in enumerate(ids):
        frames = int(layout.is_leading(ids[:position]).sum())
        allowed, may_end = layout.allowed_next(position, frames)
        assert token in allowed and vocab.end_of_audio not in allowed
        assert may_end == (position > 0 and layout.num_positions(frames) == position)
        has_code = layout.has_code(
            position, layout.is_leading(ids[: position + 1]).sum(), np.arange(vocab.num_codebooks)
        )
        if layout.uses_side_codes:
            np.testing.assert_array_equal(has_code, side_codes[position] != NO_CODE)
    if ids.size:
        assert layout.allowed_next(ids.size, len(codes))[1]


@given(layouts_and_codes(), st.randoms(use_true_random=False))
def test_whatever_is_allowed_decodes(case, random):
    vocab, codes = case
    layout, max_frames = vocab.codec_layout, len(codes) + 1
    ids: list[int] = []
    while True:
        frames = int(layout.is_leading(np.array(ids, dtype=np.int64)).sum())
        allowed, may_end = layout.allowed_next(len(ids), frames)
        if frames == max_frames:
            allowed = [token for token in allowed if token not in layout.leading_ids]
        if may_end and (not allowed or random.random() < 0.2):
            break
        ids.append(random.choice(allowed))
    assert 1 <= frames <= max_frames and len(ids) == layout.num_positions(frames)
    decoded = layout.decode(np.array(ids), np.zeros((len(ids), vocab.num_codebooks), dtype=np.int64))
    assert decoded.shape == (frames, vocab.num_codebooks)
    np.testing.assert_array_equal(layout.encode(decoded)[0], ids)


@given(layouts_and_codes())
def test_steps_tell_what_is_read_together(case):
    vocab, codes = case
    layout = vocab.codec_layout
    steps = layout.steps(layout.num_positions(len(codes)))
    assert (np.diff(steps) >= 0).all() and set(steps.tolist()) == set(range(steps[-1] + 1 if steps.size else 0))
    assert steps.size == 0 or np.bincount(steps).max() <= (1 if layout.uses_side_codes else vocab.num_codebooks)


def test_the_layouts_written_out():
    codes = np.array([[1, 3, 5], [2, 4, 6]])
    none = NO_CODE
    written = {
        "frame": ([52, 52], [[1, 3, 5], [2, 4, 6]]),
        "frame_delay": ([52, 52, 53, 53], [[1, none, none], [2, 3, none], [none, 4, 5], [none, none, 6]]),
        "flat": ([54, 66, 78, 55, 67, 79], None),
        "flat_delay": ([54, 55, 66, 67, 78, 79], None),
    }
    for name, (ids, side_codes) in written.items():
        found_ids, found_side_codes = vocab_of(name).codec_layout.encode(codes)
        assert found_ids.tolist() == ids
        if side_codes:
            assert found_side_codes.tolist() == side_codes
    assert vocab_of("flat_delay").codec_layout.steps(6).tolist() == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize(
    ("name", "ids", "message"),
    [
        ("frame", [52, 7], r"audio position 1 holds id 7, not frame \(52\)"),
        ("frame_delay", [52, 52], "2 audio positions: 3 delayed codebooks need more"),
        ("frame_delay", [52, 53, 52], r"audio position 2 holds id 52, not tail \(53\)"),
        ("frame_delay", [53, 53, 53], r"audio position 0 holds id 53, not frame \(52\)"),
        ("flat", [53, 63], "2 audio positions are no whole number of 3-code frames"),
        ("flat", [53, 53, 73], "audio position 1 holds id 53, which is not in codebook 1"),
        ("flat", [52, 63, 73], "audio position 0 holds id 52, which is not in codebook 0"),
        ("flat", [53, 63, 83], "audio position 2 holds id 83, which is not in codebook 2"),
        ("flat_delay", [53, 63, 73, 53, 63, 73], "audio position 1 holds id 63, which is not in codebook 0"),
    ],
)
def test_ids_that_are_no_frames_are_refused(name, ids, message):
    with pytest.raises(DataError, match=message):
        vocab_of(name).codec_layout.decode(np.array(ids), np.zeros((len(ids), 3), dtype=np.int64))


@pytest.mark.parametrize("name", DELAYED)
def test_a_delay_needs_codebooks_to_be_apart(name):
    with pytest.raises(ConfigError, match=f"vocab.layout='{name}': needs at least 2 codebooks"):
        vocab_of(name, num_codebooks=1)


@pytest.mark.parametrize("name", CODEC_LAYOUTS)
def test_numpy_and_torch_agree(name):
    layout = vocab_of(name).codec_layout
    ids = np.arange(vocab_of(name).size)
    for tell in (layout.is_leading, layout.holds_side_codes):
        assert tell(torch.from_numpy(ids)).tolist() == tell(ids).tolist()


@pytest.mark.parametrize("name", CODEC_LAYOUTS)
def test_codes_the_wrong_way_round_are_not_taken(name):
    with pytest.raises(AssertionError, match=r"are not \[frames, 3\]"):
        vocab_of(name).codec_layout.encode(np.zeros((3, 5), dtype=np.int64))


@pytest.mark.parametrize("name", CODEC_LAYOUTS)
@pytest.mark.parametrize("num_codebooks", [2, 3, 5])
def test_the_first_positions_hold_the_first_frames(name: str, num_codebooks: int) -> None:
    """A frame is whole as soon as the position of its last code is there."""
    layout = CODEC_LAYOUTS[name](10, num_codebooks, 50)
    codes = np.random.default_rng(0).integers(0, 50, (6, num_codebooks))
    ids, side_codes = layout.encode(codes)
    for stop in range(len(ids) + 1):
        found = layout.whole_frames(ids[:stop], side_codes[:stop])
        np.testing.assert_array_equal(found, codes[: len(found)])
        needed = {"frame": 1, "frame_delay": num_codebooks, "flat": num_codebooks}.get(name)
        if needed is not None:
            step = 1 if name != "flat" else num_codebooks
            assert len(found) == max(0, (stop - needed) // step + 1)
    assert len(found) == 6


@pytest.mark.parametrize("name", CODEC_LAYOUTS)
@pytest.mark.parametrize("num_codebooks", [2, 3, 5])
def test_open_audio_stops_where_the_next_frame_begins(name: str, num_codebooks: int) -> None:
    layout = CODEC_LAYOUTS[name](10, num_codebooks, 50)
    codes = np.random.default_rng(0).integers(0, 50, (9, num_codebooks))
    whole, whole_side = layout.encode(codes)
    for num_frames in range(1, 8):
        ids, side_codes = layout.encode_open(codes[:num_frames])
        np.testing.assert_array_equal(ids, whole[: len(ids)])
        np.testing.assert_array_equal(side_codes, whole_side[: len(ids)])
        assert layout.is_leading(ids).sum() == num_frames and layout.is_leading(whole[len(ids)])
