"""What the examples report: judged suites, and the numbers of a training."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from megatron_most.checkpointing import read_metadata
from megatron_most.config import RunConfig
from megatron_most.evaluation.interface import EvaluatedModel
from megatron_most.evaluation.recognizers import Recognizer
from megatron_most.evaluation.running import run_suite
from megatron_most.evaluation.suites.base import Suite
from megatron_most.evaluation.suites.speech import AsrSuite, Codes, EvaluationSet, ReferenceAudioSuite, TtsSuite
from megatron_most.files import read_json, write_json
from megatron_most.inference import Decoding
from megatron_most.model import count_parameters


def training_summary(run_dir: Path, config: RunConfig) -> dict[str, Any]:
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


def judge_set(
    model: EvaluatedModel,
    evaluated: EvaluationSet,
    codes: Codes,
    recognizer: Recognizer,
    decoding: tuple[Decoding, Decoding],
    folder: Path,
    resume: bool = False,
) -> dict[str, dict[str, Any]]:
    """ASR and TTS of one set, and the recognizer on the originals and on the codec's round trip, which bound TTS.

    Args:
        codes: of the set's audio.
        decoding: of what is written, and of what is spoken.
        folder: for the results, ``<suite>_<set>.json``. Those of TTS also name the sounds of the other two.
        resume: take what was judged before from there.
    """
    name, codec = evaluated.name, model.codec
    suites: dict[str, tuple[str, Suite, EvaluatedModel | None]] = {
        "original": ("original audio", ReferenceAudioSuite(codec, evaluated, recognizer), None),
        "roundtrip": ("codec round trip", ReferenceAudioSuite(codec, evaluated, recognizer, codes), None),
        "asr": ("ASR", AsrSuite(evaluated, decoding[0], codes), model),
        "tts": ("TTS", TtsSuite(evaluated, recognizer, decoding[1]), model),
    }
    results = {
        suite: judge(f"{label} of {name}", task, asked, folder / f"{suite}_{name}.json" if resume else None)
        for suite, (label, task, asked) in suites.items()
    }
    for kind in ("original", "roundtrip"):
        for item, source in zip(results["tts"]["items"], results[kind]["items"], strict=True):
            if f"{kind}_wav" in source:
                item[f"{kind}_wav"] = source[f"{kind}_wav"]
    for suite, result in results.items():
        write_json(folder / f"{suite}_{name}.json", result)
    return results


def judge(label: str, suite: Suite, model: EvaluatedModel | None = None, output: Path | None = None) -> dict[str, Any]:
    """Run a suite of word errors and say its result; with ``output``, what was judged before is taken from there."""
    start = time.monotonic()
    result = run_suite(suite, model, output)
    print(f"  {label}: WER {result['wer']:.2%} ({time.monotonic() - start:.0f} s)", flush=True)
    return result


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
