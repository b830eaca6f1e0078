"""The shipped codec: what it is, and that its codes depend on nothing but the audio up to their frame."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from examples.quickstart.codec import evaluate_codec
from examples.quickstart.espeak import Espeak
from examples.quickstart.make_corpus import render
from megatron_most.audio import load_codec
from megatron_most.audio.sound_stream import SoundStream, reach_of

CODEC = Path(evaluate_codec.__file__).parent / "tiny_codec.nemo"
SAMPLES_PER_FRAME = 640
ROW = {"text": "the red fox sees two small birds", "speed": 170, "pitch": 50, "offset": 100}


@pytest.fixture(scope="module")
def model():
    """NeMo's own model: these tests are about the file, not about our wrapper."""
    from nemo.collections.tts.models import AudioCodecModel

    return AudioCodecModel.restore_from(str(CODEC), map_location="cpu").float().eval()


@pytest.fixture(scope="module")
def speech():
    return torch.from_numpy(render(Espeak(), ROW))


@torch.inference_mode()
def encode(model, audio, lengths):
    return model.encode(audio=audio, audio_len=torch.tensor(lengths))


@torch.inference_mode()
def decode(model, tokens, lengths):
    return model.decode(tokens=tokens, tokens_len=torch.tensor(lengths))


def test_file_is_small_and_its_config_names_no_data_and_no_paths():
    assert CODEC.stat().st_size <= 4e6
    with tarfile.open(CODEC) as archive:
        text = archive.extractfile("./model_config.yaml").read().decode()
    config = yaml.safe_load(text)
    assert not {"train_ds", "validation_ds", "test_ds"} & set(config)
    assert "/" not in text
    assert "CausalHiFiGANEncoder" in config["audio_encoder"]["_target_"]
    assert "CausalHiFiGANDecoder" in config["audio_decoder"]["_target_"]


def test_shape(model):
    assert (model.sample_rate, model.samples_per_frame) == (16000, SAMPLES_PER_FRAME)
    assert (model.num_codebooks, model.codebook_size) == (4, 1000)


def test_codes_do_not_depend_on_batch_padding(model, speech):
    length = len(speech)
    alone, (num_frames,) = encode(model, speech[None], [length])
    assert num_frames == -(-length // SAMPLES_PER_FRAME)
    batch = torch.zeros(2, 2 * length)
    batch[0, :length] = speech
    batch[1] = 0.1 * torch.randn(2 * length, generator=torch.Generator().manual_seed(0))
    batched, _ = encode(model, batch, [length, 2 * length])
    assert torch.equal(batched[0, :, :num_frames], alone[0])


def test_codes_of_a_prefix_are_the_prefix_of_the_codes(model, speech):
    """Of whole frames: encoding looks at nothing after the end of a frame."""
    codes, _ = encode(model, speech[None], [len(speech)])
    for num_frames in (1, 7, 30):
        prefix = speech[None, : num_frames * SAMPLES_PER_FRAME]
        prefix_codes, _ = encode(model, prefix, [prefix.shape[1]])
        assert torch.equal(prefix_codes, codes[:, :, :num_frames])


def test_decoded_prefix_is_the_prefix_of_what_is_decoded(model, speech):
    codes, (num_frames,) = encode(model, speech[None], [len(speech)])
    audio, (num_samples,) = decode(model, codes, [num_frames])
    assert num_samples == num_frames * SAMPLES_PER_FRAME
    first, _ = decode(model, codes[:, :, :20], [20])
    torch.testing.assert_close(first[0], audio[0, : 20 * SAMPLES_PER_FRAME], atol=1e-4, rtol=0)
    padded = torch.cat([codes, torch.full_like(codes, 999)], dim=2)
    same, _ = decode(model, padded, [num_frames])
    torch.testing.assert_close(same[0, :num_samples], audio[0], atol=1e-4, rtol=0)


def test_our_wrapper_gives_the_same_codes(model, speech):
    codes, _ = encode(model, speech[None], [len(speech)])
    np.testing.assert_array_equal(load_codec(CODEC).encode(speech.numpy()), codes[0].numpy().T)


def test_speech_comes_back_as_speech(model, speech):
    """Level (within 6 dB) and loudness contour survive the round trip; words are evaluate_codec.py's business."""
    codes, lengths = encode(model, speech[None], [len(speech)])
    decoded = decode(model, codes, lengths.tolist())[0][0, : len(speech)]

    def contour(audio):
        return audio[: len(speech) // 640 * 640].unflatten(0, (-1, 640)).square().mean(1).sqrt()

    assert contour(decoded).mean() == pytest.approx(contour(speech).mean().item(), rel=0.5)
    assert np.corrcoef(contour(decoded), contour(speech))[0, 1] > 0.8


def test_code_statistics_by_hand():
    used, entropies = evaluate_codec.code_statistics(np.array([[0, 3], [0, 3], [1, 3], [1, 3]]), codebook_size=5)
    assert used == [2, 1]
    assert entropies == pytest.approx([1.0, 0.0])


def test_sound_of_frames_that_come_one_after_another_is_that_of_all(speech):
    """The codec is causal, so nothing is waited for; and a piece is decoded with few frames before it."""
    codec = load_codec(CODEC)
    codes = codec.encode(speech.numpy())
    reach = reach_of(codec, codec.num_codebooks)
    assert reach.is_exact and reach.after == 0 and 0 < reach.before < 40
    stream, pieces, start = SoundStream(codec, codec.num_codebooks), [], 0
    for size in (1, 5, 2, 9, len(codes)):
        pieces.append(stream.add(codes[start : start + size]))
        start = min(start + size, len(codes))
        assert sum(map(len, pieces)) == start * SAMPLES_PER_FRAME
    assert not len(stream.finish())
    np.testing.assert_allclose(np.concatenate(pieces), codec.decode(codes), atol=1e-5)
