"""Train the quickstart codec on one CPU core.

    python examples/quickstart/make_corpus.py --output runs/quickstart/corpus
    python examples/quickstart/codec/train_codec.py --corpus runs/quickstart/corpus --output tiny_codec.nemo

A waveform encoder learns slowly at first: through a quantizer and an untrained decoder it hardly gets a gradient. Three
things, none of them part of the finished codec, bring the training down to minutes:

* the encoder's first convolution starts as a bank of band-pass filters, mel-spaced, in sine and cosine pairs;
* a small head must read each frame's log-mel spectrum from the frame's own code; the first stage trains only that,
  without the decoder;
* every latent dimension is pulled to mean 0 and variance 1, which spreads codes over all quantizer levels.

Codes should be about sounds, not wave shapes: that makes them predictable for a language model. So the encoder hears a
slightly shifted, perhaps inverted, faintly noisy version of what the decoder has to say. (All losses compare
magnitudes, but a decoder without phase to reproduce does not keep the encoder from spending bits on it.)

Shape letters: B crops, N samples of a crop, T codec frames of a crop, D latent dimensions.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path

import librosa
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from examples.quickstart.codec.crops import CropSampler, broad_waveforms, template_waveforms  # noqa: E402
from megatron_most.cli import run  # noqa: E402

CONFIG = Path(__file__).parent / "tiny_codec.yaml"
SAVE_EVERY_SECONDS = 300
WARM_UP_STEPS, FINAL_LR_FRACTION = 100, 0.01


class MelHead(torch.nn.Module):
    """Reads the log-mel spectrum of a frame, in two halves, from the frame's quantized latent vector."""

    NUM_MELS, WINDOW, FFT = 64, 640, 1024

    def __init__(self, latent_dim: int, sample_rate: int, samples_per_frame: int):
        super().__init__()
        self.hop = samples_per_frame // 2
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(latent_dim, 256), torch.nn.GELU(), torch.nn.Linear(256, 2 * self.NUM_MELS)
        )
        torch.nn.init.constant_(self.mlp[2].bias, -3.0)  # near the mean of the targets
        filters = librosa.filters.mel(sr=sample_rate, n_fft=self.FFT, n_mels=self.NUM_MELS)
        self.register_buffer("filters", torch.from_numpy(filters))
        self.register_buffer("window", torch.hann_window(self.WINDOW))

    def targets(self, audio: torch.Tensor) -> torch.Tensor:
        """Audio ``[B, N]`` -> log-mel spectra ``[B, T, 2 * NUM_MELS]``; no window reaches past the end of its frame."""
        margin = (self.FFT - self.WINDOW) // 2  # torch.stft centers the window in the FFT
        padded = functional.pad(audio, (self.WINDOW - self.hop + margin, margin))
        spectrum = torch.stft(padded, self.FFT, self.hop, self.WINDOW, self.window, center=False, return_complex=True)
        log_mel = torch.log(self.filters @ spectrum.abs() + 0.01)  # [B, NUM_MELS, 2 * T]
        return log_mel.unflatten(2, (-1, 2)).permute(0, 2, 1, 3).flatten(2)

    def loss(self, latents: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
        """Mean absolute error of what is read from ``latents [B, D, T]`` about ``audio [B, N]``."""
        return functional.l1_loss(self.mlp(latents.transpose(1, 2)), self.targets(audio))


@torch.no_grad()
def start_as_filter_bank(model, lowest_hz: float = 80.0, highest_hz: float = 7600.0, gain: float = 4.0) -> None:
    """Set the encoder's first convolution to windowed sine and cosine pairs at mel-spaced center frequencies."""
    convolution = model.audio_encoder.pre_conv.conv
    num_filters, _, kernel_size = convolution.weight.shape
    centers = librosa.mel_frequencies(num_filters // 2, fmin=lowest_hz, fmax=highest_hz, htk=True)
    times = (np.arange(kernel_size) - kernel_size / 2) / model.sample_rate
    filters = []
    for center, bandwidth in zip(centers, np.gradient(centers), strict=True):
        half_width = min(kernel_size / 2 / model.sample_rate, 1 / (2 * bandwidth))
        envelope = np.where(np.abs(times) < half_width, np.cos(np.pi * times / (2 * half_width)) ** 2, 0.0)
        envelope *= gain / envelope.sum()
        filters += [envelope * np.cos(2 * np.pi * center * times), envelope * np.sin(2 * np.pi * center * times)]
    convolution.weight = torch.tensor(np.stack(filters), dtype=torch.float32).unsqueeze(1)
    convolution.bias.zero_()


@torch.no_grad()
def standardise_latents(model, audio: torch.Tensor, lengths: torch.Tensor) -> None:
    """Scale and shift the encoder's last convolution so that its output on ``audio`` has mean 0 and variance 1."""
    convolution = model.audio_encoder.post_conv.conv
    latents, _ = model.encode_audio(audio=audio, audio_len=lengths)
    convolution.weight = convolution.weight / latents.std((0, 2))[:, None, None]
    convolution.bias.zero_()
    latents, _ = model.encode_audio(audio=audio, audio_len=lengths)
    convolution.bias.sub_(latents.mean((0, 2)))


def spread_loss(latents: torch.Tensor) -> torch.Tensor:
    """Zero when every dimension of ``latents [B, D, T]`` has mean 0 and variance 1: tanh then fills all levels."""
    mean, deviation = latents.mean((0, 2)), latents.std((0, 2))
    return mean.square().mean() + (deviation + 1e-4).log().square().mean()


def build_model(config: DictConfig):
    """NeMo's ``AudioCodecModel`` for ``config.model``, with the starting weights described above."""
    from nemo.collections.tts.models import AudioCodecModel

    model = AudioCodecModel(cfg=config.model)
    start_as_filter_bank(model)
    return model


def save_codec(model, path: Path) -> None:
    """Write ``model`` as a .nemo with fp16 weights; the model itself stays fp32."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    temporary = path.with_name("unfinished-" + path.name)  # NeMo insists on the .nemo suffix
    model.half().save_to(str(temporary))
    os.replace(temporary, path)
    model.float().load_state_dict(weights)


def train_stage(
    model, head: MelHead, stage: DictConfig, training: DictConfig, crops: CropSampler, output: Path
) -> None:
    """Train for ``stage.minutes`` of wall time, saving to ``output`` on the way when the stage has a decoder."""
    parameters = [*model.audio_encoder.parameters(), *head.parameters()]
    if stage.decoder:
        parameters += model.audio_decoder.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=stage.lr, betas=(0.8, 0.99), weight_decay=0.0, fused=True)
    lengths = torch.full((training.batch_size,), crops.num_samples)
    started = reported = saved = time.monotonic()
    step, total = 0, stage.minutes * 60
    while (elapsed := time.monotonic() - started) < total:
        cosine = 0.5 * (1 + math.cos(math.pi * elapsed / total))
        warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * warm_up * (FINAL_LR_FRACTION + (1 - FINAL_LR_FRACTION) * cosine)

        heard, wanted = crops.batch(training.batch_size)
        with torch.autocast("cpu", torch.bfloat16):
            latents, num_frames = model.encode_audio(audio=heard, audio_len=lengths)
            latents = latents.float()
            quantized, _ = model.vector_quantizer(inputs=latents, input_len=num_frames)
            if stage.decoder:
                spoken, _ = model.audio_decoder(inputs=quantized, input_len=num_frames)
        losses = {
            "head": stage.head_scale * head.loss(quantized, wanted),
            "spread": training.spread_scale * spread_loss(latents),
        }
        if stage.decoder:
            pair = {"audio_real": wanted, "audio_gen": spoken.float(), "audio_len": lengths}
            losses["mel"] = model.mel_loss_l1_scale * model.mel_loss_fn(**pair)[0]
            losses["stft"] = model.stft_loss_scale * model.stft_loss_fn(**pair)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, training.clip_grad_norm)
        optimizer.step()
        step += 1

        now = time.monotonic()
        if now - reported > 20:
            reported = now
            values = ", ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items())
            print(f"{stage.name}: step {step}, {elapsed / 60:.1f} of {stage.minutes} min, {values}", flush=True)
        if stage.decoder and now - saved > SAVE_EVERY_SECONDS:
            saved = now
            save_codec(model, output)


def main(arguments: argparse.Namespace) -> None:
    config = OmegaConf.load(CONFIG)
    training = config.training
    torch.manual_seed(training.seed)
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)

    model = build_model(config).train()
    crops = CropSampler(
        template_waveforms(arguments.corpus),
        broad_waveforms(training.broad_utterances, training.seed),
        num_samples=training.crop_frames * model.samples_per_frame,
        template_share=training.template_share,
        max_shift=training.max_shift,
        max_noise=training.max_noise,
        seed=training.seed,
    )
    audio, _ = crops.batch(training.batch_size)
    standardise_latents(model, audio, torch.full((len(audio),), audio.shape[1]))
    head = MelHead(config.model.audio_encoder.encoded_dim, model.sample_rate, model.samples_per_frame)
    for stage in training.stages:
        stage.minutes *= arguments.time_scale
        train_stage(model, head, stage, training, crops, arguments.output)
    save_codec(model.eval(), arguments.output)
    print(f"wrote {arguments.output} ({arguments.output.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="train the quickstart codec")
    parser.add_argument("--corpus", type=Path, required=True, help="output directory of make_corpus.py")
    parser.add_argument("--output", type=Path, required=True, help="the .nemo to write")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--time-scale", type=float, default=1.0, help="multiplies every stage's minutes (default: 1)")
    run(parser, main)
