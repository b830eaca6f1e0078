"""Measure a trained model on a data set: a checkpoint of a run, or a Hugging Face export of one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from megatron_most import cli
from megatron_most.commands.evaluate_suites import build_suite, check
from megatron_most.commands.model_options import AUDIO, SIZES, add_checkpoint, add_parts, add_sizes, layout_of
from megatron_most.data.preparation.sources import SOURCES
from megatron_most.evaluation.normalization import NORMALIZERS
from megatron_most.evaluation.scorers import SCORERS
from megatron_most.evaluation.suites import SUITES
from megatron_most.extras import require


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(
        "evaluate",
        f"{__doc__}\n\nsuites:\n"
        + "".join(f"  {k:12} {v}\n" for k, v in SUITES.items())
        + "\nscorers:\n"
        + "".join(f"  {k:15} {v}\n" for k, v in SCORERS.items()),
    )
    add_checkpoint(parser)
    parser.add_argument("--suite", required=True, choices=SUITES, help="what to evaluate")
    parser.add_argument(
        "--data",
        required=True,
        help="the evaluation set; asr, tts: a NeMo manifest (JSON lines), or what --source says; tts: or"
        " seed-tts-eval's meta.lst; others: the folder as it was published",
    )
    _add_source(parser)
    parser.add_argument("--output", required=True, help="JSON file for the result")
    parser.add_argument("--limit", type=int, help="use only the first LIMIT samples")
    parser.add_argument("--fresh", action="store_true", help="do not go on where an earlier run of the same ended")
    _add_answers(parser)
    parser.add_argument(
        "--modalities", default="S-S", help="storycloze: of story and ending, S spoken, T written (default %(default)s)"
    )
    _add_judges(parser)
    add_parts(parser)
    parser.add_argument("--batch-size", type=int, default=32, help="samples at a time (default %(default)s)")
    add_sizes(parser)
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source", choices=SOURCES, help="asr, tts: published layout of --data, as most prepare reads it"
    )
    parser.add_argument(
        "--split",
        help="swuggy, sblimp: dev (default) or test; voicebench: test (default) or a region; with --source: one of its",
    )
    parser.add_argument(
        "--audio-root", action="append", default=[], help="with --source: another folder that audio may be in"
    )
    parser.add_argument("--text-field", help="with --source: field with the text, if the data set has several")
    parser.add_argument(
        "--lower-case", action="store_true", help="with --source: fold texts that are all capitals (LibriSpeech)"
    )


def _add_judges(parser: argparse.ArgumentParser) -> None:
    """Options of who judges beside the headline."""
    parser.add_argument(
        "--scorer",
        action="append",
        default=[],
        metavar="NAME[=PATH]",
        help="tts: also score how the speech sounds; may be repeated; see above",
    )
    parser.add_argument(
        "--judge",
        metavar="URL",
        help="sqa: let a language model judge the answers, too: an endpoint of OpenAI's chat completions"
        " (https://host/v1), with its key in the environment variable MOST_JUDGE_KEY",
    )
    parser.add_argument("--judge-model", help="sqa: name of the model at --judge")


def _add_answers(parser: argparse.ArgumentParser) -> None:
    """Options of what the model writes or says, and of who judges it."""
    parser.add_argument(
        "--answer",
        choices=("written", "spoken"),
        default="written",
        help="sqa, voicebench: how the model answers (default written)",
    )
    parser.add_argument(
        "--recognizer",
        help="who listens to speech: folder of a Whisper model that CTranslate2 converted, or of a Whisper or CTC model"
        " of transformers, or a .nemo file (default: pocketsphinx, which knows the sentences of --vocabulary alone)",
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


NEEDS = {"asr": (*AUDIO, "jiwer"), "tts": (*AUDIO, "jiwer"), "text": ()} | dict.fromkeys(
    ("sqa", "voicebench"), (*AUDIO, "pyarrow")
)
"""Packages of extras that a suite needs, if not those of audio alone."""


def evaluate(arguments: argparse.Namespace) -> None:
    cli.require_positive(arguments, "limit", "max_new_tokens", "max_seconds", "batch_size", *SIZES)
    check(arguments)
    is_asked = arguments.suite in ("sqa", "voicebench")
    is_spoken = arguments.suite == "tts" or (is_asked and arguments.answer == "spoken")
    from megatron_most.evaluation.recognizers import package_of

    require(*NEEDS.get(arguments.suite, AUDIO), *([package_of(arguments.recognizer)] if is_spoken else []))
    from megatron_most.evaluation.interface import load_model
    from megatron_most.evaluation.running import results_path, run_suite
    from megatron_most.files import require_writable
    from megatron_most.parallel import is_rank_zero

    # What is wrong with the data or the output stops here, before anything is computed.
    require_writable(results_path(arguments.output))
    require_writable(arguments.output)
    suite = build_suite(arguments)
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
    if "judged_correct" in result:
        text += f"; judged correct {result['judged_correct']['score']:.2%}"
    for name, found in result.get("scores", {}).items():
        text += f"; {name.replace('_', ' ')} {found['score']:.3f}"
    if result.get("num_at_limit"):
        text += f"; answers that reached their limit: {result['num_at_limit']}"
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    cli.run(make_parser(), evaluate, arguments)


if __name__ == "__main__":
    main()
