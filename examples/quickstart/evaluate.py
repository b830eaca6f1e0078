"""Evaluate the trained quickstart model on its held-out sentences, and write evaluation/*.json and summary.json.

    python examples/quickstart/evaluate.py --run-dir runs/quickstart --corpus runs/quickstart/corpus

Sets: ``heldout_s`` (new sentences of word pairs that occur in training) and ``heldout_p`` (word pairs that do not).
Pocketsphinx reads the model's speech, the originals and the codec's round trip. It has the corpus's closed vocabulary
and a bigram model in which all word pairs are equal.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.quickstart.sentences import balanced_sentences  # noqa: E402
from examples.results import judge, judge_set, training_summary  # noqa: E402
from megatron_most import cli  # noqa: E402
from megatron_most.data.preparation.manifest import read_manifest  # noqa: E402
from megatron_most.evaluation.interface import EvaluatedModel  # noqa: E402
from megatron_most.evaluation.recognizers.closed_vocabulary import PocketsphinxRecognizer  # noqa: E402
from megatron_most.evaluation.suites.speech import (  # noqa: E402
    AsrSuite,
    EvaluationSet,
    encode_records,
)
from megatron_most.files import write_json  # noqa: E402
from megatron_most.inference import Decoding, load_for_generation  # noqa: E402

NORMALIZER = "basic"  # Whisper's turns "two nine", two words of the corpus, into one number
SETS = {"heldout_s": "heldout", "heldout_p": "heldout_hard"}
NUM_SAMPLES = 4
MAX_SECONDS = 4.0
MAX_NEW_TEXT = 16  # twice a sentence's ids: an untrained model never ends one


def evaluate(arguments: argparse.Namespace) -> None:
    cli.require_positive(arguments, "limit")
    run_dir, corpus = arguments.run_dir, arguments.corpus
    recognizer = PocketsphinxRecognizer(balanced_sentences())
    sets = {
        name: EvaluationSet(
            name,
            read_manifest(corpus / f"{name}.jsonl")[: arguments.limit],
            NORMALIZER,
            run_dir / "samples",
            NUM_SAMPLES,
        )
        for name in SETS
    }
    written, spoken = Decoding(max_new=MAX_NEW_TEXT), Decoding(max_seconds=MAX_SECONDS)
    untrained = _load(run_dir, random_weights=True)
    codes = {name: encode_records(untrained.codec, one.records) for name, one in sets.items()}

    summary: dict[str, Any] = {}
    first = next(iter(SETS))
    result = judge("ASR of the untrained model", AsrSuite(sets[first], written, codes[first]), untrained)
    summary["asr_wer_untrained"] = result["wer"]
    model = _load(run_dir)
    for name, key in SETS.items():
        one, known = sets[name], codes[name]
        results = judge_set(model, one, known, recognizer, (written, spoken), run_dir / "evaluation")
        suffix = key.removeprefix("heldout")
        summary[f"asr_wer_{key}"] = results["asr"]["wer"]
        summary[f"tts_wer_{key}"] = results["tts"]["wer"]
        summary[f"original_wer{suffix}"] = results["original"]["wer"]
        summary[f"codec_roundtrip_wer{suffix}"] = results["roundtrip"]["wer"]
    write_json(run_dir / "summary.json", summary | training_summary(run_dir, model.loaded.config))


def _load(run_dir: Path, **options: Any) -> EvaluatedModel:
    return EvaluatedModel(load_for_generation(run_dir, **options), {"name": str(run_dir), **options})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="evaluate the quickstart model on its held-out sentences")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--corpus", type=Path, default=Path("runs/quickstart/corpus"))
    parser.add_argument("--limit", type=int, default=100, help="utterances of each set (default %(default)s)")
    cli.run(parser, evaluate)
