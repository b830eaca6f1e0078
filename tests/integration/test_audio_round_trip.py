"""Audio -> codes -> a dataset on disk -> codes -> audio, with the shipped codec."""

from pathlib import Path

import numpy as np
import pytest

from megatron_most.audio import load_codec
from megatron_most.data.storage.codes import CodecIdentity
from megatron_most.data.storage.inspection import audio_of
from megatron_most.data.storage.token_dataset import DatasetWriter, TokenDataset
from megatron_most.vocab import CODEC_LAYOUTS, VocabLayout
from tests.unit.data.tiny import TEXT_VOCAB, example_document

CODEC = Path(__file__).parents[2] / "examples/quickstart/codec/tiny_codec.nemo"


@pytest.fixture(scope="module")
def codec():
    return load_codec(CODEC)


@pytest.fixture(scope="module")
def codes(codec) -> np.ndarray:
    time = np.arange(9000) / codec.sample_rate
    waveform = 0.4 * np.sin(2 * np.pi * 180 * time * (1 + time)) + np.random.default_rng(0).normal(0, 0.01, time.size)
    return codec.encode(waveform.astype(np.float32))


@pytest.mark.parametrize("layout_name", CODEC_LAYOUTS)
@pytest.mark.parametrize("task", ["asr", "tts", "speech_lm", "chat"])
def test_sound_out_of_a_dataset_is_the_codecs_own_reconstruction(codec, codes, tmp_path, task, layout_name):
    vocab = VocabLayout(TEXT_VOCAB, codec.num_codebooks, codec.codebook_size, layout_name)
    with DatasetWriter(tmp_path / "data", task, vocab) as writer:
        writer.add(example_document(task, vocab, "fox", codes))
        writer.commit({"codec": CodecIdentity.of(codec).to_dict()})
    dataset = TokenDataset(tmp_path / "data")
    expected = codec.decode(codes)
    assert np.abs(expected).max() > 0.01
    for found in audio_of(dataset.document(0), dataset.vocab):
        np.testing.assert_array_equal(codec.decode(found), expected)


def test_the_first_codebooks_alone_give_sound_that_comes_nearer_with_each(codec, codes):
    whole = codec.decode(codes)
    errors = []
    for count in range(1, codec.num_codebooks):
        part = codec.decode(codes[:, :count])
        assert part.shape == whole.shape and np.isfinite(part).all()
        errors.append(float(np.square(part - whole).mean()))
    assert errors[-1] > 0 and errors[-1] < errors[0]
