"""Train the studio's codec on its voice.

    python examples/studio/codec/train_codec.py --speech runs/studio/speech --output runs/studio/codec/codec.nemo

The recipe is the quickstart's (``examples/quickstart/codec/train_codec.py``: a filter bank to begin with, a first stage
for the encoder alone, a head that reads spectra from single frames), with what keeps the pitch. A decoder that has
never been told where a period of the voice begins cannot put it anywhere, and whispers; losses on magnitudes do not ask
for it. So here the encoder hears exactly what the decoder has to say, and everything below 500 Hz, where the first
harmonics of a voice are, is also compared sample by sample: what the decoder says, and what a second small head reads
from each frame's code. The harmonics above follow the first ones.

An interrupted training goes on where it was, to within two minutes. Its time counts, not its steps.

Shape letters: B crops, N samples of a crop, T codec frames of a crop, D latent dimensions.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from examples.quickstart.codec.crops import CropSampler  # noqa: E402
from examples.quickstart.codec.train_codec import (  # noqa: E402
    FINAL_LR_FRACTION,
    WARM_UP_STEPS,
    MelHead,
    save_codec,
    spread_loss,
    standardise_latents,
    start_as_filter_bank,
)
from megatron_most.audio import file_fingerprint, read_audio  # noqa: E402
from megatron_most.cli import require_positive, run  # noqa: E402
from megatron_most.errors import DataError  # noqa: E402
from megatron_most.files import replacing  # noqa: E402
from megatron_most.platform import device as this_device  # noqa: E402

CONFIG = Path(__file__).parent / "studio_codec.yaml"
SAVE_EVERY_SECONDS, REPORT_EVERY_SECONDS = 120, 20
LOW_HZ = 500
LOW_STEP, LOW_TAPS = 8, 255
"""The low-passed signal keeps every 8th sample."""


class LowPass(torch.nn.Module):
    """Audio ``[B, N]`` -> what is below 500 Hz, ``[B, N / 8]``, late by half the filter's taps."""

    def __init__(self, sample_rate: int) -> None:
        super().__init__()
        times = torch.arange(LOW_TAPS) - LOW_TAPS // 2
        cutoff = 2 * LOW_HZ / sample_rate
        taps = cutoff * torch.sinc(cutoff * times) * torch.hann_window(LOW_TAPS, periodic=False)
        self.register_buffer("taps", (taps / taps.sum())[None, None])

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        padded = functional.pad(audio, (LOW_TAPS - LOW_STEP, 0))[:, None]
        return functional.conv1d(padded, self.taps, stride=LOW_STEP)[:, 0]

    def loss(self, said: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Mean absolute difference of two low-passed signals, as a share of what is wanted."""
        return functional.l1_loss(said, wanted) / (wanted.abs().mean() + 1e-4)


class WaveHead(torch.nn.Module):
    """Reads a frame's low-passed samples from the frame's quantized latent vector."""

    def __init__(self, latent_dim: int, samples_per_frame: int) -> None:
        super().__init__()
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(latent_dim, 256),
            torch.nn.GELU(),
            torch.nn.Linear(256, 256),
            torch.nn.GELU(),
            torch.nn.Linear(256, samples_per_frame // LOW_STEP),
        )

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """``[B, D, T]`` -> ``[B, N / 8]``."""
        return self.mlp(latents.transpose(1, 2)).flatten(1)


class Training:
    """Model, heads and progress: all that a file of the training's state holds."""

    def __init__(self, config: DictConfig, device: torch.device) -> None:
        from nemo.collections.tts.models import AudioCodecModel

        self.config, self.device = config, device
        self.model = AudioCodecModel(cfg=config.model)
        start_as_filter_bank(self.model)
        self.model.to(device).train()
        latent_dim, frame = config.model.audio_encoder.encoded_dim, self.model.samples_per_frame
        self.mel = MelHead(latent_dim, self.model.sample_rate, frame).to(device)
        self.wave = WaveHead(latent_dim, frame).to(device)
        self.low_pass = LowPass(self.model.sample_rate).to(device)
        self.stage, self.step, self.steps, self.seconds = 0, 0, 0, 0.0

    def modules(self) -> dict[str, torch.nn.Module]:
        return {"model": self.model, "mel": self.mel, "wave": self.wave}

    def parameters(self) -> list[torch.nn.Parameter]:
        """What the present stage trains."""
        modules = [self.model.audio_encoder, self.mel, self.wave]
        if self.config.training.stages[self.stage].decoder:
            modules.append(self.model.audio_decoder)
        return [parameter for module in modules for parameter in module.parameters()]

    def make_optimizer(self) -> torch.optim.Optimizer:
        lr = self.config.training.stages[self.stage].lr
        return torch.optim.AdamW(self.parameters(), lr=lr, betas=(0.8, 0.99), weight_decay=0.0, fused=True)

    def losses(self, heard: torch.Tensor, wanted: torch.Tensor) -> dict[str, torch.Tensor]:
        """Weighted losses of one batch, both ``[B, N]``."""
        settings = self.config.training
        stage, model = settings.stages[self.stage], self.model
        lengths = torch.full((len(heard),), heard.shape[1], device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            latents, frames = model.encode_audio(audio=heard, audio_len=lengths)
            latents = latents.float()
            quantized, _ = model.vector_quantizer(inputs=latents, input_len=frames)
            said = model.audio_decoder(inputs=quantized, input_len=frames)[0].float() if stage.decoder else None
        low = self.low_pass(wanted)
        losses = {
            "mel head": stage.head_scale * self.mel.loss(quantized, wanted),
            "wave head": stage.head_scale * self.low_pass.loss(self.wave(quantized), low),
            "spread": settings.spread_scale * spread_loss(latents),
        }
        if said is not None:
            pair = {"audio_real": wanted, "audio_gen": said, "audio_len": lengths}
            losses["mel"] = model.mel_loss_l1_scale * model.mel_loss_fn(**pair)[0]
            losses["stft"] = model.stft_loss_scale * model.stft_loss_fn(**pair)
            losses["wave"] = settings.wave_scale * self.low_pass.loss(self.low_pass(said), low)
        return losses

    def save(self, path: Path, optimizer: torch.optim.Optimizer, identity: str) -> None:
        state: dict[str, Any] = {name: module.state_dict() for name, module in self.modules().items()}
        state |= {"stage": self.stage, "step": self.step, "steps": self.steps, "seconds": self.seconds}
        state |= {"optimizer": optimizer.state_dict(), "identity": identity}
        with replacing(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path, identity: str) -> torch.optim.Optimizer | None:
        """Go on from ``path``; None if it is not there, or is of another configuration."""
        if not path.is_file():
            return None
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["identity"] != identity:
            print(f"{path}: is of another configuration or other data; starting anew", flush=True)
            return None
        for name, module in self.modules().items():
            module.load_state_dict(state[name])
        self.stage, self.step, self.steps, self.seconds = (state[n] for n in ("stage", "step", "steps", "seconds"))
        optimizer = self.make_optimizer()
        optimizer.load_state_dict(state["optimizer"])
        print(f"goes on in stage {self.stage + 1} after {self.seconds / 60:.1f} min, {self.steps} steps", flush=True)
        return optimizer


def lr_at(peak: float, step: int, fraction: float) -> float:
    """Linear warm-up by steps, then a cosine over the stage's time, of which ``fraction`` is over."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0)))
    return peak * min(1.0, (step + 1) / WARM_UP_STEPS) * (FINAL_LR_FRACTION + (1 - FINAL_LR_FRACTION) * cosine)


def train(training: Training, crops: CropSampler, minutes: list[float], output: Path, identity: str) -> None:
    """Train all stages; ``minutes`` is the time of each."""
    state = output.with_suffix(".state.pt")
    optimizer = training.load(state, identity)
    settings = training.config.training
    while training.stage < len(settings.stages):
        stage, total = settings.stages[training.stage], minutes[training.stage] * 60
        optimizer = optimizer or training.make_optimizer()
        parameters = training.parameters()
        reported = saved = before = time.monotonic()
        while training.seconds < total:
            for group in optimizer.param_groups:
                group["lr"] = lr_at(stage.lr, training.step, training.seconds / total)
            heard, wanted = (audio.to(training.device) for audio in crops.batch(settings.batch_size))
            losses = training.losses(heard, wanted)
            optimizer.zero_grad(set_to_none=True)
            torch.stack(list(losses.values())).sum().backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip_grad_norm)
            optimizer.step()
            now = time.monotonic()
            training.seconds, before = training.seconds + now - before, now
            training.step, training.steps = training.step + 1, training.steps + 1
            if now - reported > REPORT_EVERY_SECONDS:
                reported = now
                report(training, total, losses, output)
            if now - saved > SAVE_EVERY_SECONDS:
                saved = now
                training.save(state, optimizer, identity)
        training.stage, training.step, training.seconds, optimizer = training.stage + 1, 0, 0.0, None
        if training.stage < len(settings.stages):
            training.save(state, training.make_optimizer(), identity)
    save_codec(training.model.cpu().eval(), output)
    state.unlink(missing_ok=True)


def report(training: Training, total: float, losses: dict[str, torch.Tensor], output: Path) -> None:
    stage = training.config.training.stages[training.stage].name
    values = {name: round(loss.item(), 4) for name, loss in losses.items()}
    shown = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
    done = f"{training.seconds / 60:.1f} of {total / 60:.1f} min"
    print(f"{stage}: step {training.step}, {done}, {shown}", flush=True)
    entry = {"stage": stage, "step": training.steps, "seconds": round(training.seconds, 1)} | values
    with open(output.with_suffix(".jsonl"), "a") as log:
        log.write(json.dumps(entry) + "\n")


def read_speech(manifest: Path, sample_rate: int, hours: float) -> list[np.ndarray]:
    """Waveforms of the first so many hours of a manifest.

    Raises:
        DataError: the manifest is missing or broken.
    """
    waveforms, seconds = [], 0.0
    try:
        entries = [json.loads(line) for line in manifest.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{manifest}: not readable; speak it first (examples/studio/speak.py): {error}") from error
    for entry in entries:
        waveforms.append(read_audio(entry["audio_filepath"], sample_rate))
        seconds += entry["duration"]
        if seconds >= hours * 3600:
            break
    return waveforms


def main(arguments: argparse.Namespace) -> None:
    require_positive(arguments, "minutes", "threads")
    config = OmegaConf.load(arguments.config)
    settings = config.training
    torch.manual_seed(settings.seed)
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    device = this_device()
    if arguments.batch_size is not None:
        settings.batch_size = arguments.batch_size

    manifest = arguments.speech / "train.jsonl"
    waveforms = read_speech(manifest, config.model.sample_rate, settings.hours)
    training = Training(config, device)
    crops = CropSampler(
        waveforms,
        [],
        num_samples=settings.crop_frames * training.model.samples_per_frame,
        template_share=1.0,
        max_shift=0,
        max_noise=settings.max_noise,
        seed=time.time_ns() % 2**32,  # a training that goes on draws other crops
        inverts=False,
    )
    audio = crops.batch(settings.batch_size)[0].to(device)
    standardise_latents(training.model, audio, torch.full((len(audio),), audio.shape[1], device=device))
    share = settings.encoder_share
    minutes = [arguments.minutes * share, arguments.minutes * (1 - share)]
    identity = json.dumps([OmegaConf.to_container(config), minutes, file_fingerprint(manifest)], sort_keys=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    train(training, crops, minutes, arguments.output, identity)
    size = arguments.output.stat().st_size / 1e6
    print(f"wrote {arguments.output} ({size:.1f} MB) after {training.steps} steps")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="train the studio's codec")
    parser.add_argument("--speech", type=Path, required=True, help="output folder of speak.py")
    parser.add_argument("--output", type=Path, required=True, help="the .nemo to write")
    parser.add_argument("--config", type=Path, default=CONFIG, help="default: studio_codec.yaml beside this script")
    parser.add_argument("--minutes", type=float, default=240.0, help="of training (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    parser.add_argument("--batch-size", type=int, help="crops of a step (default: the configuration's)")
    run(parser, main)
