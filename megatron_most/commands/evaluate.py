"""Word error rate of a trained model: of its transcripts (asr), or of what a recognizer hears in its speech (tts)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_most import cli
from megatron_most.evaluation.normalization import NORMALIZERS, check_normalizer, default_normalizer, text_normalizer
from megatron_most.extras import require


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("evaluate", __doc__)
    parser.add_argument(
        "--checkpoint", required=True, help="checkpoint directory, or run directory (its newest checkpoint)"
    )
    parser.add_argument("--suite", required=True, choices=("asr", "tts"), help="what to evaluate")
    parser.add_argument("--data", required=True, help="NeMo manifest (JSON lines) of the evaluation set")
    parser.add_argument("--output", required=True, help="JSON file for the result")
    parser.add_argument("--limit", type=int, help="use only the first LIMIT utterances")
    parser.add_argument(
        "--vocabulary",
        nargs="+",
        help="tts: manifests with all sentences that the recognizer can hear (default: --data)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        help="asr: maximum length of a transcript in ids (default: what the model's context leaves)",
    )
    parser.add_argument(
        "--max-seconds",
        type=float,
        help="tts: maximum length of an utterance (default: what the model's context leaves)",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="tts: sampling temperature; 0 (default) is greedy"
    )
    parser.add_argument(
        "--normalizer",
        choices=NORMALIZERS,
        help="text normalizer of reference and hypothesis (default: whisper-english for English references, basic for"
        " those with letters of other languages)",
    )
    parser.add_argument("--tokenizer", help="text tokenizer, if it has moved since training")
    parser.add_argument("--codec", help="codec, if it has moved since training")
    return parser


def evaluate(arguments: argparse.Namespace) -> None:
    cli.require_positive(arguments, "limit", "max_new_tokens", "max_seconds")
    require("nemo", "soundfile", "soxr", "jiwer", *(["pocketsphinx"] if arguments.suite == "tts" else []))
    from megatron_most.data.preparation.manifest import read_manifest
    from megatron_most.evaluation.recognizer import PocketsphinxRecognizer
    from megatron_most.evaluation.suites import EvaluationSet, evaluate_asr, evaluate_tts
    from megatron_most.files import require_writable, write_json
    from megatron_most.inference import Sampling, load_for_generation

    sampling = Sampling(arguments.temperature)
    records = read_manifest(arguments.data, needs_audio=arguments.suite == "asr")[: arguments.limit]
    if arguments.suite == "tts":
        manifests = arguments.vocabulary or [arguments.data]
        sentences = [record.text for path in manifests for record in read_manifest(path, needs_audio=False)]
        recognizer = PocketsphinxRecognizer(sentences)
    # A wrong normalizer stops here, before anything is computed.
    references = [record.text for record in records]
    normalizer = arguments.normalizer or default_normalizer(references)
    text_normalizer(normalizer)
    check_normalizer(normalizer, references)
    evaluated = EvaluationSet(Path(arguments.data).stem, records, normalizer)
    require_writable(arguments.output)
    model = load_for_generation(arguments.checkpoint, arguments.tokenizer, arguments.codec)
    if arguments.suite == "asr":
        result = evaluate_asr(model, evaluated, max_new=arguments.max_new_tokens)
    else:
        result = evaluate_tts(model, evaluated, recognizer, sampling, arguments.max_seconds)
    write_json(arguments.output, result)
    print(summary_of(result))


def summary_of(result: dict[str, Any]) -> str:
    """One line: the rate with its interval, and what was not answered or not to the end."""
    text = f"{result['suite']} {result['set']}: WER {result['wer']:.2%}"
    if result["wer_interval"]:
        low, high = result["wer_interval"]
        text += f" (95% interval {low:.2%} to {high:.2%})"
    text += f" on {result['num_utterances']} utterances (normalizer: {result['normalizer']})"
    if result["num_failed"]:
        failed = next(item for item in result["items"] if "failed" in item)
        text += f"; failed and counted as wrong: {result['num_failed']}, first {failed['id']}: {failed['failed']}"
    if result["num_at_limit"]:
        text += f"; answers that reached their limit: {result['num_at_limit']}"
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    cli.run(make_parser(), evaluate, arguments)


if __name__ == "__main__":
    main()
