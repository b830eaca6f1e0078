"""The suites of ``most evaluate``, built from its arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_most.errors import ConfigError

if TYPE_CHECKING:
    from megatron_most.data.preparation.manifest import Record
    from megatron_most.evaluation.judge import Judge
    from megatron_most.evaluation.recognizers import Recognizer
    from megatron_most.evaluation.scorers.scoring import Scoring
    from megatron_most.evaluation.suites.base import Suite
    from megatron_most.inference import Decoding

OF_SUITES = {
    "source": ("asr", "tts"),
    "audio_root": ("asr", "tts"),
    "text_field": ("asr", "tts"),
    "lower_case": ("asr", "tts"),
    "scorer": ("tts",),
    "judge": ("sqa",),
    "judge_model": ("sqa",),
}
"""Options -> the suites that take them."""


def check(arguments: argparse.Namespace) -> None:
    """Raise :class:`ConfigError` for options of other suites, or that need each other."""
    for option, suites in OF_SUITES.items():
        if getattr(arguments, option) and arguments.suite not in suites:
            raise ConfigError(f"--{option.replace('_', '-')}: is for --suite {' or '.join(suites)}")
    if bool(arguments.judge) != bool(arguments.judge_model):
        raise ConfigError("--judge and --judge-model: each needs the other")
    if arguments.split and not arguments.source and arguments.suite not in ("swuggy", "sblimp", "voicebench"):
        raise ConfigError("--split: is for --suite swuggy, sblimp or voicebench, or with --source")
    if (arguments.audio_root or arguments.text_field or arguments.lower_case) and not arguments.source:
        raise ConfigError("--audio-root, --text-field and --lower-case: need --source")


def build_suite(arguments: argparse.Namespace) -> Suite[Any]:
    from megatron_most.evaluation.suites.stories import Salmon, StoryCloze
    from megatron_most.evaluation.suites.text import TextSuite
    from megatron_most.evaluation.suites.zerospeech import Sblimp, Swuggy

    data, limit, split = arguments.data, arguments.limit, arguments.split or "dev"
    builders: dict[str, Callable[[], Suite[Any]]] = {
        "asr": lambda: _word_errors(arguments),
        "tts": lambda: _word_errors(arguments),
        "swuggy": lambda: Swuggy(data, split, limit),
        "sblimp": lambda: Sblimp(data, split, limit),
        "storycloze": lambda: StoryCloze(data, arguments.modalities, limit),
        "salmon": lambda: Salmon(data, limit),
        "sqa": lambda: _questions(arguments),
        "voicebench": lambda: _questions(arguments),
        "text": lambda: TextSuite(data, limit),
    }
    return builders[arguments.suite]()


def _decoding(arguments: argparse.Namespace) -> Decoding:
    from megatron_most.inference import Decoding, Sampling

    return Decoding(arguments.max_new_tokens, arguments.max_seconds, Sampling(arguments.temperature))


def _word_errors(arguments: argparse.Namespace) -> Suite[Any]:
    from megatron_most.evaluation.suites.speech import AsrSuite, EvaluationSet, TtsSuite

    everything = _records(arguments)
    records = everything[: arguments.limit]
    name = Path(arguments.data).stem if arguments.split is None else f"{Path(arguments.data).stem} {arguments.split}"
    evaluated = EvaluationSet(name, records, arguments.normalizer)
    if arguments.suite == "asr":
        return AsrSuite(evaluated, _decoding(arguments))
    recognizer = _recognizer(arguments, _vocabulary(arguments) if arguments.vocabulary else everything)
    return TtsSuite(evaluated, recognizer, _decoding(arguments), _scoring(arguments, records))


def _records(arguments: argparse.Namespace) -> Sequence[Record]:
    """What is transcribed or spoken."""
    if arguments.source is None:
        return _texts(arguments.data, needs_audio=arguments.suite == "asr")
    from megatron_most.data.preparation.collect import SourceSpec, read_source
    from megatron_most.data.preparation.sources import SourceOptions

    splits = () if arguments.split is None else (arguments.split,)
    options = SourceOptions(splits=splits, text_field=arguments.text_field, lower_case=arguments.lower_case)
    records = read_source(SourceSpec(arguments.source, arguments.data, tuple(arguments.audio_root), options))
    if arguments.suite == "asr" and any(record.audio is None for record in records):
        raise ConfigError(f"--source {arguments.source}: has no audio to transcribe")
    return records


def _texts(path: str, *, needs_audio: bool = False) -> Sequence[Record]:
    """The texts of a manifest or of seed-tts-eval's list."""
    from megatron_most.data.preparation.manifest import read_manifest
    from megatron_most.evaluation.suites import meta_list

    if Path(path).suffix == meta_list.SUFFIX and not needs_audio:
        return [entry.record for entry in meta_list.read_meta_list(path)]
    return read_manifest(path, needs_audio=needs_audio)


def _scoring(arguments: argparse.Namespace, records: Sequence[Record]) -> Scoring | None:
    if not arguments.scorer:
        return None
    from megatron_most.evaluation.scorers import load_scorer
    from megatron_most.evaluation.scorers.scoring import Scoring
    from megatron_most.evaluation.suites import meta_list

    scorers = [load_scorer(named) for named in arguments.scorer]
    if arguments.source is None and Path(arguments.data).suffix == meta_list.SUFFIX:
        prompts = {entry.record.id: entry.prompt for entry in meta_list.read_meta_list(arguments.data)}
        return Scoring(scorers, records, prompts, meta_list.PROMPT_VOICE)
    return Scoring(scorers, records)


def _questions(arguments: argparse.Namespace) -> Suite[Any]:
    recognizer = None
    if arguments.answer == "spoken":
        if not arguments.vocabulary and arguments.recognizer is None:
            raise ConfigError("--answer spoken: needs --recognizer, or --vocabulary with all that can be heard")
        recognizer = _recognizer(arguments, _vocabulary(arguments))
    data, decoding, limit = arguments.data, _decoding(arguments), arguments.limit
    if arguments.suite == "voicebench":
        from megatron_most.evaluation.suites.voicebench import SPLIT, VoiceBenchSuite

        return VoiceBenchSuite(data, arguments.split or SPLIT, decoding, recognizer, limit)
    from megatron_most.evaluation.suites.questions import QuestionSuite

    return QuestionSuite(data, decoding, recognizer, limit, _judge(arguments))


def _judge(arguments: argparse.Namespace) -> Judge | None:
    if not arguments.judge:
        return None
    from megatron_most.evaluation.judge import Judge

    return Judge(arguments.judge, arguments.judge_model)


def _vocabulary(arguments: argparse.Namespace) -> Iterable[Record]:
    return (record for path in arguments.vocabulary or () for record in _texts(path))


def _recognizer(arguments: argparse.Namespace, heard: Iterable[Record]) -> Recognizer:
    """Who listens.

    Args:
        heard: all that a recognizer of a closed vocabulary can hear.
    """
    if arguments.recognizer is not None:
        from megatron_most.evaluation.recognizers import load_recognizer

        return load_recognizer(arguments.recognizer, arguments.language)
    from megatron_most.evaluation.recognizers.closed_vocabulary import PocketsphinxRecognizer

    return PocketsphinxRecognizer(record.text for record in heard)
