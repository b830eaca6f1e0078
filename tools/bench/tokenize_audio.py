#!/usr/bin/env python
"""Speed of encoding audio into codes, against the loop of NeMo's model cards: one file at a time, unbatched.

    python -m tools.bench.tokenize_audio [--codec FILE] [--files N] [--shortest S] [--longest S] [--blocks N]

Both arms decode, resample and encode the same files with one thread of one process. Durations are log-uniform; sample
rates and channels vary. A second comparison uses the whole machine: the loop with one thread per core against
``most prepare tokenize`` with one process per core, from manifest to finished output.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import soundfile
import torch

from megatron_most import cli
from megatron_most.audio import load_codec
from megatron_most.audio.nemo_codec import NemoCodec
from megatron_most.data.preparation import tokenize_audio
from megatron_most.data.preparation.encode_shard import encode_shard
from megatron_most.data.preparation.shards import Execution, Limits, Shard
from megatron_most.data.preparation.sources import Roots
from megatron_most.data.storage.codes import CodesDataset
from tools.bench import paired

TINY_CODEC = Path(__file__).parents[2] / "examples" / "quickstart" / "codec" / "tiny_codec.nemo"
FORMATS = ((16000, 1), (22050, 1), (44100, 2), (48000, 1))


def bench_tokenization(arguments: argparse.Namespace) -> None:
    cli.require_positive(arguments, "files", "shortest", "longest", "blocks", "threads")
    torch.set_num_threads(arguments.threads)
    codec = load_codec(arguments.codec)
    plain = NemoLoop(arguments.codec)
    with tempfile.TemporaryDirectory() as folder:
        paths, seconds = write_corpus(Path(folder), arguments.files, arguments.shortest, arguments.longest)
        shard = write_shard(Path(folder), paths)
        require_equal(plain(paths), encode(shard, codec), codec)
        print(f"{len(paths)} files of {arguments.shortest:g} to {arguments.longest:g} s, {seconds:.0f} s in total")
        print("\none core:")
        arms = {"NeMo, a file at a time": lambda: plain(paths), "shard of the tokenizer": lambda: encode(shard, codec)}
        show(arms, arguments.blocks, seconds)
        cores = len(os.sched_getaffinity(0))
        print(f"\nthe whole machine ({cores} cores; CPU time is the first process's alone):")
        arms = {
            f"NeMo, {cores} threads": lambda: plain(paths, threads=cores),
            f"tokenize, {cores} processes": lambda: whole_job(Path(folder), arguments.codec, codec, cores),
        }
        show(arms, arguments.blocks, seconds)


def show(arms: dict, blocks: int, seconds: float) -> None:
    comparison = paired.compare(arms, baseline=next(iter(arms)), blocks=blocks, seconds_per_sample=0.0, warm_up=1)
    print(comparison)
    for arm, elapsed in comparison.seconds.items():
        print(f"  {arm}: {seconds / elapsed:.0f} hours of audio per hour")


def write_corpus(folder: Path, count: int, shortest: float, longest: float) -> tuple[list[Path], float]:
    """FLAC files of a voice-like sound in several formats, and their total seconds."""
    generator = np.random.default_rng(0)
    lengths = np.exp(np.linspace(np.log(shortest), np.log(longest), count))
    generator.shuffle(lengths)
    paths = []
    for index, seconds in enumerate(lengths):
        rate, channels = FORMATS[index % len(FORMATS)]
        time = np.arange(round(rate * seconds)) / rate
        voice = np.sin(2 * np.pi * 120 * time) * np.sin(2 * np.pi * 3 * time) * 0.3
        samples = voice + generator.normal(0, 0.01, len(time))
        paths.append(folder / f"{index}.flac")
        soundfile.write(paths[-1], np.repeat(samples[:, None], channels, axis=1), rate)
    return paths, float(lengths.sum())


def write_shard(folder: Path, paths: list[Path]) -> Shard:
    """A shard of all files."""
    manifest = folder / "m.jsonl"
    entries = [{"id": path.stem, "audio_filepath": path.name, "text": "x", "where": path.stem} for path in paths]
    manifest.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return Shard(folder / "shard", manifest, 0, manifest.stat().st_size, len(paths))


class NemoLoop:
    """NeMo's model with its way of loading audio, one file after another."""

    def __init__(self, path: Path) -> None:
        from nemo.collections.tts.models import AudioCodecModel

        with contextlib.redirect_stdout(io.StringIO()):
            self._model = AudioCodecModel.restore_from(str(path), map_location="cpu").float().eval()

    def __call__(self, paths: list[Path], threads: int | None = None) -> list[np.ndarray]:
        import librosa

        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        codes = []
        with torch.no_grad():
            for path in paths:
                audio, _ = librosa.load(path, sr=self._model.sample_rate)
                audio = torch.from_numpy(audio)[None]
                tokens, _ = self._model.encode(audio=audio, audio_len=torch.tensor([audio.shape[1]]))
                codes.append(tokens[0].numpy())
        torch.set_num_threads(before)
        return codes


def encode(shard: Shard, codec: NemoCodec) -> Shard:
    roots = Roots([shard.manifest.parent])
    encode_shard(shard, codec, roots, Limits(), report=lambda *_: None, should_stop=lambda: False)
    return shard


def whole_job(folder: Path, path: Path, codec: NemoCodec, workers: int) -> CodesDataset | None:
    """What the command does, without loading the codec (nor does the loop), in shards small enough for this corpus."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    with (
        mock.patch.multiple(tokenize_audio, load_codec=lambda _: codec, SHARD_SIZES=(4, 1024)),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        return tokenize_audio.tokenize_audio(
            folder / "m.jsonl", path, folder / "out" / "codes", execution=Execution(workers)
        )


def require_equal(expected: list[np.ndarray], shard: Shard, codec: NemoCodec) -> None:
    """Raise if more than one code in 1000 differs; the arms resample with different calls, so a few do."""
    found = [codes for _, codes in shard.utterances(codec.num_codebooks, np.dtype(np.uint16).type)]
    different = sum(int((codes.T.reshape(-1) != got).sum()) for codes, got in zip(expected, found, strict=True))
    total = sum(codes.size for codes in expected)
    print(f"{different} of {total} codes differ from NeMo's")
    if different > total / 1000:
        raise SystemExit("error: the two arms do not compute the same")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", type=Path, default=TINY_CODEC, help=".nemo file (default: the quickstart's)")
    parser.add_argument("--files", type=int, default=48)
    parser.add_argument("--shortest", type=float, default=0.5, help="seconds (default %(default)g)")
    parser.add_argument("--longest", type=float, default=15.0, help="seconds (default %(default)g)")
    paired.add_arguments(parser)
    return parser


if __name__ == "__main__":
    cli.run(make_parser(), bench_tokenization)
