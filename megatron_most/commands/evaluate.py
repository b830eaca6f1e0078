"""Measure a trained model on a data set: a checkpoint of a run, or a Hugging Face export of one."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_most import cli
from megatron_most.commands.model_options import AUDIO, SIZES, add_checkpoint, add_parts, add_sizes, layout_of
from megatron_most.errors import ConfigError
from megatron_most.evaluation.normalization import NORMALIZERS
from megatron_most.evaluation.suites import SUITES
from megatron_most.extras import require

if TYPE_CHECKING:
    from megatron_most.data.preparation.manifest import Record
    from megatron_most.evaluation.recognizers import Recognizer
    from megatron_most.evaluation.suites.base import Suite
    from megatron_most.inference import Decoding


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(
        "evaluate", f"{__doc__}\n\nsuites:\n" + "".join(f"  {k:12} {v}\n" for k, v in SUITES.items())
    )
    add_checkpoint(parser)
    parser.add_argument("--suite", required=True, choices=SUITES, help="what to evaluate")
    parser.add_argument(
        "--data",
        required=True,
        help="the evaluation set; asr, tts: a NeMo manifest (JSON lines); tts: or seed-tts-eval's meta.lst; others: the"
        " folder as it was published",
    )
    parser.add_argument("--output", required=True, help="JSON file for the result")
    parser.add_argument("--limit", type=int, help="use only the first LIMIT samples")
    parser.add_argument("--fresh", action="store_true", help="do not go on where an earlier run of the same ended")
    _add_answers(parser)
    parser.add_argument("--split", default="dev", help="swuggy, sblimp: dev (default) or test")
    parser.add_argument(
        "--modalities", default="S-S", help="storycloze: of story and ending, S spoken, T written (default %(default)s)"
    )
    add_parts(parser)
    parser.add_argument("--batch-size", type=int, default=32, help="samples at a time (default %(default)s)")
    add_sizes(parser)
    return parser


def _add_answers(parser: argparse.ArgumentParser) -> None:
    """Options of what the model writes or says, and of who judges it."""
    parser.add_argument(
        "--answer",
        choices=("written", "spoken"),
        default="written",
        help="sqa: how the model answers (default written)",
    )
    parser.add_argument(
        "--recognizer",
        help="who listens to speech: folder of a Whisper model that CTranslate2 converted, or of a Whisper or CTC model"
        " of transformers (default: pocketsphinx, which knows the sentences of --vocabulary alone)",
    )
    parser.add_argument(
        "--language", default="en", help="language that a multilingual --recognizer hears (default %(default)s)"
    )
    parser.add_argument(
        "--vocabulary",
        nargs="+",
        help="manifests with all sentences that the recognizer can hear (tts: default --data; sqa with spoken answers)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        help="maximum length of a written answer in ids (default: what the model's context leaves)",
    )
    parser.add_argument(
        "--max-seconds",
        type=float,
        help="maximum length of a spoken answer (default: what the model's context leaves)",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="sampling temperature; 0 (default) is greedy")
    parser.add_argument(
        "--normalizer",
        choices=NORMALIZERS,
        help="text normalizer of reference and hypothesis (default: whisper-english for English references, basic for"
        " those with letters of other languages)",
    )


NEEDS = {"asr": (*AUDIO, "jiwer"), "tts": (*AUDIO, "jiwer"), "sqa": (*AUDIO, "pyarrow"), "text": ()}
"""Packages of extras that a suite needs, if not those of audio alone."""


def evaluate(arguments: argparse.Namespace) -> None:
    cli.require_positive(arguments, "limit", "max_new_tokens", "max_seconds", "batch_size", *SIZES)
    is_spoken = arguments.suite == "tts" or (arguments.suite == "sqa" and arguments.answer == "spoken")
    from megatron_most.evaluation.recognizers import package_of

    require(*NEEDS.get(arguments.suite, AUDIO), *([package_of(arguments.recognizer)] if is_spoken else []))
    from megatron_most.evaluation.interface import load_model
    from megatron_most.evaluation.running import results_path, run_suite
    from megatron_most.files import require_writable
    from megatron_most.parallel import is_rank_zero

    # What is wrong with the data or the output stops here, before anything is computed.
    require_writable(results_path(arguments.output))
    require_writable(arguments.output)
    suite = _suite(arguments)
    model = load_model(
        arguments.checkpoint,
        arguments.tokenizer,
        arguments.codec,
        layout=layout_of(arguments),
        needs_codec=arguments.suite != "text",
        batch_size=arguments.batch_size,
    )
    result = run_suite(suite, model, arguments.output, fresh=arguments.fresh)
    if is_rank_zero():
        print(summary_of(result))


def _suite(arguments: argparse.Namespace) -> Suite[Any]:
    from megatron_most.evaluation.suites.stories import Salmon, StoryCloze
    from megatron_most.evaluation.suites.text import TextSuite
    from megatron_most.evaluation.suites.zerospeech import Sblimp, Swuggy

    data, limit = arguments.data, arguments.limit
    builders: dict[str, Callable[[], Suite[Any]]] = {
        "asr": lambda: _word_errors(arguments),
        "tts": lambda: _word_errors(arguments),
        "swuggy": lambda: Swuggy(data, arguments.split, limit),
        "sblimp": lambda: Sblimp(data, arguments.split, limit),
        "storycloze": lambda: StoryCloze(data, arguments.modalities, limit),
        "salmon": lambda: Salmon(data, limit),
        "sqa": lambda: _questions(arguments),
        "text": lambda: TextSuite(data, limit),
    }
    return builders[arguments.suite]()


def _decoding(arguments: argparse.Namespace) -> Decoding:
    from megatron_most.inference import Decoding, Sampling

    return Decoding(arguments.max_new_tokens, arguments.max_seconds, Sampling(arguments.temperature))


def _recognizer(arguments: argparse.Namespace, manifests: Sequence[str]) -> Recognizer:
    if arguments.recognizer is not None:
        from megatron_most.evaluation.recognizers import load_recognizer

        return load_recognizer(arguments.recognizer, arguments.language)
    from megatron_most.evaluation.recognizers.closed_vocabulary import PocketsphinxRecognizer

    return PocketsphinxRecognizer(record.text for path in manifests for record in _texts(path))


def _texts(path: str) -> Sequence[Record]:
    """The texts of a manifest or of seed-tts-eval's list."""
    from megatron_most.data.preparation.manifest import read_manifest
    from megatron_most.evaluation.suites import meta_list

    if Path(path).suffix == meta_list.SUFFIX:
        return meta_list.read_meta_list(path)
    return read_manifest(path, needs_audio=False)


def _word_errors(arguments: argparse.Namespace) -> Suite[Any]:
    from megatron_most.data.preparation.manifest import read_manifest
    from megatron_most.evaluation.suites.speech import AsrSuite, EvaluationSet, TtsSuite

    records = read_manifest(arguments.data) if arguments.suite == "asr" else _texts(arguments.data)
    records = records[: arguments.limit]
    evaluated = EvaluationSet(Path(arguments.data).stem, records, arguments.normalizer)
    if arguments.suite == "asr":
        return AsrSuite(evaluated, _decoding(arguments))
    return TtsSuite(evaluated, _recognizer(arguments, arguments.vocabulary or [arguments.data]), _decoding(arguments))


def _questions(arguments: argparse.Namespace) -> Suite[Any]:
    from megatron_most.evaluation.suites.questions import QuestionSuite

    recognizer = None
    if arguments.answer == "spoken":
        if not arguments.vocabulary and arguments.recognizer is None:
            raise ConfigError("--answer spoken: needs --recognizer, or --vocabulary with all that can be heard")
        recognizer = _recognizer(arguments, arguments.vocabulary or [])
    return QuestionSuite(arguments.data, _decoding(arguments), recognizer, arguments.limit)


def summary_of(result: dict[str, Any]) -> str:
    """One line: the score with its interval, and what was not answered or not to the end."""
    metric = {"wer": "WER"}.get(result["metric"], result["metric"].replace("_", " "))
    form = ".4f" if result["metric"] == "bits_per_byte" else ".2%"
    text = f"{result['suite']} {result['set']}: {metric} {result['score']:{form}}"
    if result["interval"]:
        low, high = result["interval"]
        text += f" (95% interval {low:{form}} to {high:{form}})"
    if "perplexity" in result:
        text += f", perplexity {result['perplexity']:.2f}"
    text += f" on {result['num_samples']} {'utterances' if 'num_utterances' in result else 'samples'}"
    if "normalizer" in result:
        text += f" (normalizer: {result['normalizer']})"
    if result["num_failed"]:
        first = result["failed"][0]
        text += f"; failed and counted as wrong: {result['num_failed']}, first {first['id']}: {first['failed']}"
    if result.get("num_at_limit"):
        text += f"; answers that reached their limit: {result['num_at_limit']}"
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    cli.run(make_parser(), evaluate, arguments)


if __name__ == "__main__":
    main()
