"""How well the quickstart codec keeps words, and how its codes are spread.

    python examples/quickstart/make_corpus.py --output runs/quickstart/corpus
    python examples/quickstart/codec/evaluate_codec.py --corpus runs/quickstart/corpus

For each held-out set: the word error rate of pocketsphinx (closed vocabulary, bigram) on the original audio and on what
comes back from the codec. Then, over the round trips: codes in use and entropy per codebook, how many frames keep their
code when the audio is delayed by 1 ms, and how far the pitch of voiced frames is off.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import librosa
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from examples.quickstart.sentences import balanced_sentences  # noqa: E402
from megatron_most.audio import load_codec, read_audio  # noqa: E402
from megatron_most.cli import run  # noqa: E402
from megatron_most.errors import DataError  # noqa: E402
from megatron_most.evaluation.recognizers.closed_vocabulary import PocketsphinxRecognizer  # noqa: E402
from megatron_most.evaluation.wer import word_errors  # noqa: E402

HELD_OUT_SETS = ("heldout_s", "heldout_p")
DELAY_SECONDS = 0.001
PITCH_UTTERANCES = 20  # pitch tracking is slow
PITCH_RANGE_HZ = (55.0, 300.0)


def read_set(corpus: Path, name: str, sample_rate: int, limit: int | None) -> tuple[list[str], list[np.ndarray]]:
    """Texts and waveforms of one held-out set of a corpus made by make_corpus.py."""
    manifest = corpus / f"{name}.jsonl"
    if not manifest.exists():
        raise DataError(f"no manifest {manifest}: make the corpus first (examples/quickstart/make_corpus.py)")
    entries = [json.loads(line) for line in manifest.read_text().splitlines()[:limit]]
    return [entry["text"] for entry in entries], [read_audio(entry["audio_filepath"], sample_rate) for entry in entries]


def code_statistics(codes: np.ndarray, codebook_size: int) -> tuple[list[int], list[float]]:
    """Of codes ``[num_frames, num_codebooks]``: distinct codes and entropy in bits, per codebook."""
    counts = [np.bincount(codebook, minlength=codebook_size) for codebook in codes.T]
    entropies = []
    for count in counts:
        share = count[count > 0] / count.sum()
        entropies.append(float(-(share * np.log2(share)).sum()))
    return [int((count > 0).sum()) for count in counts], entropies


def pitch_tracks(original: np.ndarray, decoded: np.ndarray, sample_rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Fundamental frequencies of both in Hz, ``[num_frames]`` each; NaN where a frame is not voiced."""
    low, high = PITCH_RANGE_HZ
    first, second = (
        librosa.pyin(audio, fmin=low, fmax=high, sr=sample_rate, frame_length=1024, fill_na=np.nan)[0]
        for audio in (original, decoded[: len(original)])
    )
    return first, second


def pitch_errors(original: np.ndarray, decoded: np.ndarray, sample_rate: int) -> tuple[np.ndarray, float]:
    """Pitch deviation in semitones ``[num_frames voiced in both]`` and the share of voiced frames that stay voiced."""
    first, second = pitch_tracks(original, decoded, sample_rate)
    voiced = np.isfinite(first)
    both = voiced & np.isfinite(second)
    return np.abs(12 * np.log2(second[both] / first[both])), float(both.sum() / max(1, voiced.sum()))


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    codec = load_codec(arguments.codec)
    recognizer = PocketsphinxRecognizer(balanced_sentences())
    all_codes: list[np.ndarray] = []
    unchanged: list[float] = []
    deviations: list[np.ndarray] = []
    still_voiced: list[float] = []
    coding_seconds = audio_seconds = 0.0

    for name in HELD_OUT_SETS:
        texts, waveforms = read_set(arguments.corpus, name, codec.sample_rate, arguments.limit)
        started = time.perf_counter()
        codes = [codec.encode(waveform) for waveform in waveforms]
        decoded = [codec.decode(utterance) for utterance in codes]
        coding_seconds += time.perf_counter() - started
        audio_seconds += sum(map(len, waveforms)) / codec.sample_rate
        for kind, sound in (("originals", waveforms), ("round trip", decoded)):
            hypotheses = [recognizer.transcribe(waveform, codec.sample_rate) for waveform in sound]
            errors = word_errors(texts, hypotheses, "basic")
            print(
                f"{name} {kind}: WER {errors.wer:.2%} ({errors.num_errors} of {errors.num_reference_words} words)",
                flush=True,
            )
        all_codes += codes
        delay = round(DELAY_SECONDS * codec.sample_rate)
        for waveform, utterance in zip(waveforms[:PITCH_UTTERANCES], codes, strict=False):
            delayed = codec.encode(np.pad(waveform, (delay, 0))[: len(waveform)])
            unchanged.append(float((delayed == utterance).mean()))
        for waveform, sound in zip(waveforms[: PITCH_UTTERANCES // 2], decoded, strict=False):
            deviation, voiced = pitch_errors(waveform, sound, codec.sample_rate)
            deviations.append(deviation)
            still_voiced.append(voiced)

    used, entropies = code_statistics(np.concatenate(all_codes), codec.codebook_size)
    print(f"codes in use per codebook: {used} of {codec.codebook_size}")
    print(f"entropy per codebook: {', '.join(f'{entropy:.1f}' for entropy in entropies)} bits")
    print(f"codes unchanged by a delay of {DELAY_SECONDS * 1000:.0f} ms: {np.mean(unchanged):.0%}")
    pitch = np.concatenate(deviations)
    print(
        f"pitch: {np.mean(still_voiced):.0%} of voiced frames stay voiced, "
        f"{np.mean(pitch < 1):.0%} of them within a semitone"
    )
    print(f"encoding and decoding: {coding_seconds / audio_seconds:.3f} of real time")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="measure the quickstart codec on the held-out sets")
    parser.add_argument("--corpus", type=Path, default=Path("runs/quickstart/corpus"), help="made by make_corpus.py")
    parser.add_argument("--codec", type=Path, default=Path(__file__).parent / "tiny_codec.nemo")
    parser.add_argument("--limit", type=int, help="only the first so many utterances of each set")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    run(parser, main)
