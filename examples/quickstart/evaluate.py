"""Evaluate the trained quickstart model on its held-out sentences, and write evaluation/*.json and summary.json.

    python examples/quickstart/evaluate.py --run-dir runs/quickstart --corpus runs/quickstart/corpus

Sets: ``heldout_s`` (new sentences of word pairs that occur in training) and ``heldout_p`` (word pairs that do not).
Pocketsphinx reads the model's speech, the originals and the codec's round trip. It has the corpus's closed vocabulary
and a bigram model in which all word pairs are equal.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from sentences import balanced_sentences

from megatron_most import cli
from megatron_most.checkpointing import read_metadata
from megatron_most.config import RunConfig
from megatron_most.data.preparation.manifest import read_manifest
from megatron_most.evaluation.interface import EvaluatedModel
from megatron_most.evaluation.recognizers.closed_vocabulary import PocketsphinxRecognizer
from megatron_most.evaluation.running import run_suite
from megatron_most.evaluation.suites.base import Suite
from megatron_most.evaluation.suites.speech import (
    AsrSuite,
    EvaluationSet,
    ReferenceAudioSuite,
    TtsSuite,
    encode_records,
)
from megatron_most.files import read_json, write_json
from megatron_most.inference import Decoding, load_for_generation
from megatron_most.model import count_parameters

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
    result = _timed("ASR of the untrained model", AsrSuite(sets[first], written, codes[first]), untrained)
    summary["asr_wer_untrained"] = result["wer"]
    model = _load(run_dir)
    for name, key in SETS.items():
        one, known = sets[name], codes[name]
        results = {
            "original": _timed(f"original audio of {name}", ReferenceAudioSuite(model.codec, one, recognizer)),
            "roundtrip": _timed(
                f"codec round trip of {name}", ReferenceAudioSuite(model.codec, one, recognizer, known)
            ),
            "asr": _timed(f"ASR of {name}", AsrSuite(one, written, known), model),
            "tts": _timed(f"TTS of {name}", TtsSuite(one, recognizer, spoken), model),
        }
        for kind in ("original", "roundtrip"):
            for item, source in zip(results["tts"]["items"], results[kind]["items"], strict=True):
                if f"{kind}_wav" in source:
                    item[f"{kind}_wav"] = source[f"{kind}_wav"]
        for suite, result in results.items():
            write_json(run_dir / "evaluation" / f"{suite}_{name}.json", result)
        suffix = key.removeprefix("heldout")
        summary[f"asr_wer_{key}"] = results["asr"]["wer"]
        summary[f"tts_wer_{key}"] = results["tts"]["wer"]
        summary[f"original_wer{suffix}"] = results["original"]["wer"]
        summary[f"codec_roundtrip_wer{suffix}"] = results["roundtrip"]["wer"]
    write_json(run_dir / "summary.json", summary | _training_summary(run_dir, model.loaded.config))


def _load(run_dir: Path, **options: Any) -> EvaluatedModel:
    return EvaluatedModel(load_for_generation(run_dir, **options), {"name": str(run_dir), **options})


def _training_summary(run_dir: Path, config: RunConfig) -> dict[str, Any]:
    """Numbers about training, from the files of the run."""
    metrics = [entry for entry in _json_lines(run_dir / "metrics.jsonl") if "loss" in entry]
    routing = _json_lines(run_dir / "routing.jsonl")
    environment = read_json(run_dir / "environment.json")
    steps = [entry["step"] for entry in metrics]
    intervals = [after - before for before, after in zip([0, *steps[:-1]], steps, strict=True)]
    seconds = sum(entry["step_seconds"] * count for entry, count in zip(metrics, intervals, strict=True))
    parameters = count_parameters(config)
    metadata = read_metadata(run_dir)
    losses = ("loss/text", "loss/audio")
    return {
        "loss_first": {name.removeprefix("loss/"): metrics[0][name] for name in losses},
        "loss_last": {name.removeprefix("loss/"): metrics[-1][name] for name in losses},
        "tokens_outside_group": sum(layer["outside_group"] for entry in routing for layer in entry["layers"]),
        "train_seconds": seconds,
        "steps": metrics[-1]["step"],
        "tokens_per_second": metrics[-1]["consumed_tokens"] / seconds,
        "parameters_total": parameters["total"],
        "parameters_active": parameters["active"],
        "layout": metadata.config["parallel"] | {"world_size": metadata.world_size},
        "versions": environment["versions"],
    }


def _timed(label: str, suite: Suite, model: EvaluatedModel | None = None) -> dict[str, Any]:
    start = time.monotonic()
    result = run_suite(suite, model)
    print(f"  {label}: WER {result['wer']:.2%} ({time.monotonic() - start:.0f} s)", flush=True)
    return result


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="evaluate the quickstart model on its held-out sentences")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--corpus", type=Path, default=Path("runs/quickstart/corpus"))
    parser.add_argument("--limit", type=int, default=100, help="utterances of each set (default %(default)s)")
    cli.run(parser, evaluate)
