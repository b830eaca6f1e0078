"""Judge the studio's model with Whisper tiny.en, and write evaluation/*.json, curve.json and summary.json.

    python examples/studio/evaluate.py --run-dir runs/studio

Each held-out set (make_text.py says which) is transcribed and spoken. tiny.en hears the model's speech, the
originals and the codec's round trip. ``curve.json`` has the word error rates of ASR and TTS on the first sentences of
the first set for every checkpoint that was kept, by its step. All rates come with 95 % intervals.

An interrupted evaluation goes on after the last sentences that were judged. Single results come from the command as
well: ``most evaluate --suite tts --recognizer FOLDER --data runs/studio/speech/heldout_pairs.jsonl ...``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.results import judge, judge_set, training_summary  # noqa: E402
from examples.studio.codec.check_codec import NORMALIZER, tiny_en  # noqa: E402
from examples.studio.make_text import HELD_OUT  # noqa: E402
from megatron_most import cli  # noqa: E402
from megatron_most.checkpointing import complete_checkpoints  # noqa: E402
from megatron_most.data.preparation.manifest import Record, read_manifest  # noqa: E402
from megatron_most.evaluation.interface import load_model  # noqa: E402
from megatron_most.evaluation.recognizers import Recognizer  # noqa: E402
from megatron_most.evaluation.suites.speech import AsrSuite, EvaluationSet, TtsSuite, encode_records  # noqa: E402
from megatron_most.files import write_json  # noqa: E402
from megatron_most.inference import Decoding  # noqa: E402

NUM_SAMPLES = 4
DECODING = Decoding(max_new=48), Decoding(max_seconds=8.0)
"""Of what is written and of what is spoken: about twice the longest sentence."""


def curve(run_dir: Path, name: str, records: Sequence[Record], recognizer: Recognizer) -> list[dict[str, Any]]:
    """For each checkpoint, oldest first: its step, and the WER of ASR and TTS with their intervals."""
    evaluated = EvaluationSet(name, records, NORMALIZER)
    points: list[dict[str, Any]] = []
    for checkpoint in complete_checkpoints(run_dir)[0]:
        model = load_model(str(checkpoint))
        codes = encode_records(model.codec, records)
        suites = {
            "asr": AsrSuite(evaluated, DECODING[0], codes),
            "tts": TtsSuite(evaluated, recognizer, DECODING[1]),
        }
        point: dict[str, Any] = {"step": model.identity["step"]}
        for task, suite in suites.items():
            output = run_dir / "curve" / f"{task}_{checkpoint.name}.json"
            output.parent.mkdir(exist_ok=True)
            result = judge(f"{task.upper()} of {checkpoint.name}", suite, model, output)
            point |= {f"{task}_wer": result["wer"], f"{task}_wer_interval": result["wer_interval"]}
        points.append(point)
    return points


def evaluate(arguments: argparse.Namespace) -> None:
    cli.require_positive(arguments, "limit", "curve_limit")
    run_dir, speech = arguments.run_dir, arguments.run_dir / "speech"
    recognizer = tiny_en()
    records = {name: read_manifest(speech / f"{name}.jsonl")[: arguments.limit] for name in arguments.sets}
    first = arguments.sets[0]
    points = curve(run_dir, first, records[first][: arguments.curve_limit], recognizer)
    write_json(run_dir / "curve.json", points)

    model = load_model(str(run_dir))
    folder = run_dir / "evaluation"
    folder.mkdir(exist_ok=True)
    summary: dict[str, Any] = {"recognizer": recognizer.name}
    for name in arguments.sets:
        one = EvaluationSet(name, records[name], NORMALIZER, run_dir / "samples", NUM_SAMPLES)
        codes = encode_records(model.codec, records[name])
        for suite, result in judge_set(model, one, codes, recognizer, DECODING, folder, resume=True).items():
            summary[f"{suite}_wer_{name}"] = result["wer"]
            summary[f"{suite}_wer_interval_{name}"] = result["wer_interval"]
    # Under these names the report shows them at its top.
    headlines = {"asr_wer_heldout": f"asr_wer_{first}", "tts_wer_heldout": f"tts_wer_{first}"}
    headlines |= {"codec_roundtrip_wer": f"roundtrip_wer_{first}", "original_wer": f"original_wer_{first}"}
    summary |= {name: summary[source] for name, source in headlines.items()}
    write_json(run_dir / "summary.json", summary | training_summary(run_dir, model.loaded.config))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="judge the studio's model with Whisper tiny.en")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/studio"))
    parser.add_argument("--sets", nargs="+", choices=HELD_OUT, default=list(HELD_OUT), help="default: all")
    parser.add_argument("--limit", type=int, default=100, help="utterances of each set (default %(default)s)")
    parser.add_argument("--curve-limit", type=int, default=40, help="of the curve (default %(default)s)")
    cli.run(parser, evaluate)
