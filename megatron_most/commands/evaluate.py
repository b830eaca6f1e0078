"""Word error rate of a trained model: of its transcripts (asr), or of what a recognizer hears in its speech (tts)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_most import cli
from megatron_most.evaluation.wer import NORMALIZERS, text_normalizer
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
        "--max-seconds", type=float, default=6.0, help="tts: maximum length of an utterance (default %(default)g)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="tts: sampling temperature; 0 (default) is greedy"
    )
    parser.add_argument(
        "--normalizer",
        choices=NORMALIZERS,
        default=NORMALIZERS[0],
        help="text normalizer of reference and hypothesis (default %(default)s)",
    )
    parser.add_argument("--tokenizer", help="text tokenizer, if it has moved since training")
    parser.add_argument("--codec", help="codec, if it has moved since training")
    return parser


def evaluate(arguments: argparse.Namespace) -> None:
    cli.require_positive(arguments, "limit", "max_seconds")
    require("nemo", "soundfile", "soxr", "jiwer", *(["pocketsphinx"] if arguments.suite == "tts" else []))
    text_normalizer(arguments.normalizer)  # a missing package is reported before anything is computed
    from megatron_most.data.preparation.manifest import read_manifest
    from megatron_most.evaluation.recognizer import PocketsphinxRecognizer
    from megatron_most.evaluation.suites import evaluate_asr, evaluate_tts
    from megatron_most.files import require_writable, write_json
    from megatron_most.inference import Sampling, load_for_generation

    sampling = Sampling(arguments.temperature)
    name = Path(arguments.data).stem
    records = read_manifest(arguments.data, needs_audio=arguments.suite == "asr")[: arguments.limit]
    if arguments.suite == "tts":
        manifests = arguments.vocabulary or [arguments.data]
        sentences = [record.text for path in manifests for record in read_manifest(path, needs_audio=False)]
        recognizer = PocketsphinxRecognizer(sentences)
    require_writable(arguments.output)
    model = load_for_generation(arguments.checkpoint, arguments.tokenizer, arguments.codec)
    if arguments.suite == "asr":
        result = evaluate_asr(model, name, records, normalizer=arguments.normalizer)
    else:
        result = evaluate_tts(
            model, name, records, recognizer, sampling, arguments.max_seconds, normalizer=arguments.normalizer
        )
    write_json(arguments.output, result)
    print(
        f"{arguments.suite} {name}: WER {result['wer']:.2%} on {result['num_utterances']} utterances"
        f" (normalizer: {result['normalizer']})"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    cli.run(make_parser(), evaluate, arguments)


if __name__ == "__main__":
    main()
