"""The NeMo codec: deterministic, range-checked, and nothing but an intact codec is let in."""

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from megatron_most.audio import codec_file, file_fingerprint, load_codec
from megatron_most.audio.nemo_codec import NemoCodec
from megatron_most.errors import ConfigError, DataError

MODULES = "nemo.collections.tts.modules.audio_codec_modules"
LOSSES = "nemo.collections.tts.losses.audio_codec_loss"
CONFIG = {
    "sample_rate": 16000,
    "samples_per_frame": 640,
    "mel_loss_l1_scale": 1.0,
    "mel_loss_l2_scale": 0.0,
    "stft_loss_scale": 1.0,
    "time_domain_loss_scale": 0.0,
    "commit_loss_scale": 0.0,
    "loss_resolutions": [[512, 128, 512]],
    "mel_loss_dims": [20],
    "audio_encoder": {
        "_target_": f"{MODULES}.CausalHiFiGANEncoder",
        "encoded_dim": 8,
        "down_sample_rates": [8, 5, 4, 4],
        "base_channels": 4,
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [1],
    },
    "audio_decoder": {
        "_target_": f"{MODULES}.CausalHiFiGANDecoder",
        "input_dim": 8,
        "up_sample_rates": [8, 5, 4, 4],
        "base_channels": 32,
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [1],
    },
    "vector_quantizer": {
        "_target_": f"{MODULES}.GroupFiniteScalarQuantizer",
        "num_groups": 2,
        "num_levels_per_group": [8, 5, 5, 5],
    },
    "generator_loss": {"_target_": f"{LOSSES}.GeneratorSquaredLoss"},
    "discriminator_loss": {"_target_": f"{LOSSES}.DiscriminatorSquaredLoss"},
    "optim": {"_target_": "torch.optim.Adam", "lr": 0.001},
}


def write_archive(path: Path, config: object, weights: dict | None = None) -> Path:
    """A ``.nemo`` file with this configuration and these weights."""
    buffer = io.BytesIO()
    torch.save(weights or {}, buffer)
    members = {"model_config.yaml": yaml.safe_dump(config).encode(), "model_weights.ckpt": buffer.getvalue()}
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def codec_path(tmp_path_factory) -> Path:
    """A tiny untrained codec whose codes vary."""
    models = pytest.importorskip("nemo.collections.tts.models")
    omegaconf = pytest.importorskip("omegaconf")
    torch.manual_seed(0)
    model = models.AudioCodecModel(cfg=omegaconf.OmegaConf.create(CONFIG)).eval()
    model.audio_encoder.post_conv.conv.parametrizations.weight.original0.data.mul_(300.0)
    path = tmp_path_factory.mktemp("codec") / "random.nemo"
    model.save_to(str(path))
    return path


@pytest.fixture(scope="module")
def codec(codec_path):
    return load_codec(codec_path)


@pytest.fixture(scope="module")
def looking_ahead(tmp_path_factory):
    """As ``codec``, but every frame depends on what follows it."""
    models = pytest.importorskip("nemo.collections.tts.models")
    omegaconf = pytest.importorskip("omegaconf")
    torch.manual_seed(0)
    encoder = {**CONFIG["audio_encoder"], "_target_": f"{MODULES}.HiFiGANEncoder"}
    model = models.AudioCodecModel(cfg=omegaconf.OmegaConf.create({**CONFIG, "audio_encoder": encoder})).eval()
    model.audio_encoder.post_conv.conv.parametrizations.weight.original0.data.mul_(300.0)
    path = tmp_path_factory.mktemp("codec") / "ahead.nemo"
    model.save_to(str(path))
    return load_codec(path)


@pytest.fixture(scope="module")
def shipped_codec():
    pytest.importorskip("nemo.collections.tts.models")
    return load_codec(Path(__file__).parents[3] / "examples" / "quickstart" / "codec" / "tiny_codec.nemo")


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, num_samples).astype(np.float32)


def test_what_a_codec_says_of_itself(codec, codec_path):
    assert (codec.num_codebooks, codec.codebook_size, codec.sample_rate) == (2, 1000, 16000)
    assert (codec.samples_per_frame, codec.frame_rate, codec.name) == (640, 25.0, "random")
    assert codec.fingerprint == file_fingerprint(codec_path)


@pytest.mark.parametrize(("num_samples", "num_frames"), [(1, 1), (640, 1), (641, 2), (16000, 25), (10001, 16)])
def test_frames_cover_the_waveform(codec, num_samples, num_frames):
    codes = codec.encode(noise(num_samples))
    assert codes.shape == (num_frames, 2) and codes.dtype == np.int64
    assert codec.decode(codes).shape == (num_frames * 640,)


def test_codes_do_not_depend_on_what_was_encoded_before(codec):
    first = codec.encode(noise(9000))
    codec.encode(noise(20000, seed=1))
    np.testing.assert_array_equal(codec.encode(noise(9000)), first)
    assert len(np.unique(first)) > 5


def test_a_loaded_copy_gives_the_same_codes_and_sound(codec, codec_path):
    again = load_codec(codec_path)
    codes = codec.encode(noise(9000))
    np.testing.assert_array_equal(again.encode(noise(9000)), codes)
    np.testing.assert_array_equal(again.decode(codes), codec.decode(codes))


def test_codes_outside_the_codebook_are_refused(codec):
    codes = np.zeros((3, 2), dtype=np.int64)
    for bad in (-1, 1000):
        codes[2, 1] = bad
        with pytest.raises(DataError, match=f"code {bad} of codebook 1, frame 2 is outside 0..999"):
            codec.decode(codes)
    with pytest.raises(DataError, match=r"expected \[frames, 2\]"):
        codec.decode(np.zeros((3, 3), dtype=np.int64))


def test_no_frames_are_no_sound(codec):
    assert codec.decode(np.zeros((0, 2), dtype=np.int64)).shape == (0,)
    with pytest.raises(DataError, match="shape"):
        codec.encode(np.zeros(0, dtype=np.float32))


def test_weights_that_are_incomplete_are_refused(codec_path, tmp_path):
    with tarfile.open(codec_path) as archive:
        files = [member for member in archive.getmembers() if member.isfile()]
        members = {Path(member.name).name: archive.extractfile(member) for member in files}
        config = yaml.safe_load(members["model_config.yaml"])
        weights = torch.load(members["model_weights.ckpt"], weights_only=True)
    dropped = next(name for name in weights if name.startswith("audio_decoder."))
    del weights[dropped]
    path = write_archive(tmp_path / "partial.nemo", config, weights)
    with pytest.raises(DataError, match=r"partial\.nemo"):
        load_codec(path)


def test_weights_with_nan_are_refused(codec_path, tmp_path):
    with tarfile.open(codec_path) as archive:
        files = [member for member in archive.getmembers() if member.isfile()]
        members = {Path(member.name).name: archive.extractfile(member) for member in files}
        config = yaml.safe_load(members["model_config.yaml"])
        weights = torch.load(members["model_weights.ckpt"], weights_only=True)
    name = next(name for name, tensor in weights.items() if name.startswith("audio_encoder.") and tensor.ndim == 1)
    weights[name][0] = torch.nan
    path = write_archive(tmp_path / "nan.nemo", config, weights)
    with pytest.raises(DataError, match=rf"nan\.nemo: the weights {name} hold NaN"):
        load_codec(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.nemo: no such file"):
        load_codec(tmp_path / "absent.nemo")


def test_a_corrupt_file_is_named_in_one_line(tmp_path):
    (tmp_path / "corrupt.nemo").write_bytes(b"not a tar" * 200)
    with pytest.raises(DataError, match=r"corrupt\.nemo: not readable as a \.nemo archive") as caught:
        load_codec(tmp_path / "corrupt.nemo")
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_named(tmp_path):
    target = {"target": "nemo.collections.tts.models.AudioCodecModel"}
    whole = write_archive(tmp_path / "whole.nemo", target, {"a": torch.zeros(5000)}).read_bytes()
    (tmp_path / "cut.nemo").write_bytes(whole[:3000])
    with pytest.raises(DataError, match=r"cut\.nemo"):
        load_codec(tmp_path / "cut.nemo")


def test_another_model_is_refused(tmp_path):
    path = write_archive(tmp_path / "asr.nemo", {"target": "nemo.collections.asr.models.EncDecCTCModel"})
    with pytest.raises(DataError, match="EncDecCTCModel': must be an AudioCodecModel"):
        load_codec(path)


def test_without_nemo_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    path = write_archive(tmp_path / "some.nemo", {**CONFIG, "target": "nemo.collections.tts.models.AudioCodecModel"})
    monkeypatch.setitem(sys.modules, "nemo.collections.tts.models", None)
    with pytest.raises(ConfigError, match="NeMo is installed and cannot be imported: "):
        load_codec(path)
    monkeypatch.setitem(sys.modules, "nemo", None)
    with pytest.raises(ConfigError, match=r"needs nemo, .*: pip install 'megatron-most\[audio\]'$"):
        load_codec(path)


def test_a_name_that_ends_in_nemo_is_a_file_and_any_other_a_pretrained_model(tmp_path, monkeypatch):
    path = write_archive(tmp_path / "some.nemo", {})
    assert codec_file(path) == codec_file(str(path)) == path
    (tmp_path / "nano-codec").touch()
    monkeypatch.chdir(tmp_path)
    assert codec_file("nano-codec") is None
    with pytest.raises(ConfigError, match=r"absent\.nemo: no such file"):
        codec_file("absent.nemo")


class WrongLengths:
    """Stands for a NeMo model: one frame too many for a waveform, one sample too few for some codes."""

    num_codebooks, codebook_size, sample_rate, output_sample_rate, samples_per_frame = 2, 1000, 16000, 16000, 640

    def encode(self, audio, audio_len):
        rows, frames = len(audio), audio.shape[1] // 640 + 1
        return torch.zeros(rows, 2, frames, dtype=torch.long), torch.full((rows,), frames)

    def encode_audio(self, audio, audio_len):
        return torch.ones(1, 8, audio.shape[1] // 640 + 1), None

    def decode(self, tokens, tokens_len):
        return torch.zeros(1, 640 * tokens.shape[2] - 1), None


def test_a_codec_that_does_not_keep_the_length_is_refused():
    codec = NemoCodec(WrongLengths(), name="wrong", fingerprint="")
    with pytest.raises(DataError, match="codec wrong: gave 3 frames for 1280 samples, 2 are expected"):
        codec.encode(noise(1000))
    with pytest.raises(DataError, match="codec wrong: gave 1919 samples for 3 frames, 1920 are expected"):
        codec.decode(np.zeros((3, 2), dtype=np.int64))


class NotFinite(WrongLengths):
    """Stands for a NeMo model whose decoder overflows."""

    def decode(self, tokens, tokens_len):
        return torch.full((1, 640 * tokens.shape[2]), torch.nan), None


def test_sound_that_is_not_finite_is_refused():
    codec = NemoCodec(NotFinite(), name="loud", fingerprint="")
    with pytest.raises(DataError, match="codec loud: gave samples that are not finite numbers for 3 frames"):
        codec.decode(np.zeros((3, 2), dtype=np.int64))


@pytest.mark.parametrize(("num_samples", "num_frames"), [(1, 1), (639, 1), (640, 1), (641, 2), (35123, 55)])
def test_the_shipped_codec_keeps_the_length(shipped_codec, num_samples, num_frames):
    codes = shipped_codec.encode(noise(num_samples))
    assert codes.shape == (num_frames, 4)
    assert shipped_codec.decode(codes).shape == (num_frames * 640,)


def alone(codec: NemoCodec, waveform: np.ndarray) -> np.ndarray:
    """What NeMo itself makes of a single file."""
    with torch.inference_mode():
        audio = torch.from_numpy(waveform)[None]
        tokens, num_frames = codec._model.encode(audio=audio, audio_len=torch.tensor([len(waveform)]))
    return tokens[0, :, : int(num_frames[0])].T.numpy()


def test_codes_do_not_depend_on_the_batch(shipped_codec, monkeypatch):
    """Every mix of neighbors, places in the batch and numbers of rows gives each file the codes it has alone."""
    generator = np.random.default_rng(0)
    monkeypatch.setattr(shipped_codec, "_batch_seconds", 4.0)  # several rows, as on a GPU
    heard: list[torch.Tensor] = []  # what the encoder gives, before it is rounded to codes
    hook = shipped_codec._model.audio_encoder.register_forward_hook(lambda _, __, output: heard.append(output[0]))
    by_shape: dict[tuple[int, int], list[np.ndarray]] = {}
    for seed, seconds in enumerate(np.exp(generator.uniform(np.log(0.05), np.log(3), 30))):
        waveform = noise(round(16000 * seconds), seed)
        by_shape.setdefault(shipped_codec.batch_shape(len(waveform)), []).append(waveform)
    assert max(map(len, by_shape.values())) > 1
    for (rows, samples), waveforms in by_shape.items():
        assert rows * samples <= max(samples, 4 * 16000)
        features = []
        single = []
        for waveform in waveforms:
            single.append(shipped_codec.encode(waveform))
            features.append(heard[-1][0])
            np.testing.assert_array_equal(single[-1], alone(shipped_codec, waveform))
        chosen = generator.permutation(len(waveforms))[:rows]
        codes = shipped_codec.encode_batch([waveforms[index] for index in chosen])
        for place, index in enumerate(chosen):
            np.testing.assert_array_equal(codes[place], single[index])
            # Codes hide most differences: what they are rounded from must be equal to the bit.
            frames = len(codes[place])
            assert torch.equal(heard[-1][place, :, :frames], features[index][:, :frames])
    hook.remove()


def test_a_codec_that_looks_ahead_is_found_out_and_never_padded(codec, looking_ahead, monkeypatch):
    assert codec._is_causal and not looking_ahead._is_causal
    with pytest.raises(DataError, match="codec ahead: needs 2560 samples or more, not 1900"):
        looking_ahead.encode(noise(1900))  # NeMo's reflection fails on three frames
    assert (codec.min_samples, looking_ahead.min_samples) == (640, 2560)
    for num_samples in (1921, 9999, 64000):
        for batch_seconds in (None, 4.0):  # as on a CPU, as on a GPU
            monkeypatch.setattr(looking_ahead, "_batch_seconds", batch_seconds)
            assert 0 <= looking_ahead.batch_shape(num_samples)[1] - num_samples < 640
        waveform = noise(num_samples, seed=num_samples)
        np.testing.assert_array_equal(looking_ahead.encode(waveform), alone(looking_ahead, waveform))
    # The trap: padded as a batch would, the last frames come out as others.
    waveform = noise(16000)
    padded = alone(looking_ahead, np.pad(waveform, (0, 16000)))[:25]
    assert (padded != alone(looking_ahead, waveform)).any()


def test_folding_weight_norm_keeps_every_bit(codec_path, codec):
    models = pytest.importorskip("nemo.collections.tts.models")
    original = models.AudioCodecModel.restore_from(str(codec_path), map_location="cpu").eval()
    assert [name for name, _ in original.named_parameters() if "parametrizations" in name]
    assert not [name for name, _ in codec._model.named_parameters() if "parametrizations" in name]
    waveform = torch.from_numpy(noise(9000))[None]
    with torch.inference_mode():
        before, after = (
            model.encode_audio(audio=waveform, audio_len=torch.tensor([9000]))[0] for model in (original, codec._model)
        )
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_codes_on_a_gpu_do_not_depend_on_the_batch():
    codec = load_codec(Path(__file__).parents[3] / "examples" / "quickstart" / "codec" / "tiny_codec.nemo")
    codec.to("cuda")
    waveforms = [noise(30000 - seed, seed) for seed in range(20)]
    for codes, waveform in zip(codec.encode_batch(waveforms), waveforms, strict=True):
        np.testing.assert_array_equal(codes, codec.encode(waveform))
