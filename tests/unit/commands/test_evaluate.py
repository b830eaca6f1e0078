"""The suites that ``most evaluate`` builds from its arguments, and options that do not fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_most.commands.evaluate import make_parser
from megatron_most.commands.evaluate_suites import build_suite, check
from megatron_most.errors import ConfigError, DataError
from megatron_most.evaluation.suites.base import Suite
from tests.unit.data.preparation import published as sources
from tests.unit.evaluation import published


def suite_of(suite: str, data: Path | str, *more: object) -> Suite[Any]:
    fixed = ["--checkpoint", "x", "--output", "x.json", "--suite", suite, "--data", str(data)]
    arguments = make_parser().parse_args([*fixed, *map(str, more)])
    check(arguments)
    return build_suite(arguments)


@pytest.mark.parametrize("suite", ["asr", "tts"])
def test_any_data_source_is_read_in_place(suite: str, tmp_path: Path) -> None:
    sources.librispeech(tmp_path / "LibriSpeech")
    more = ("--vocabulary", published.write_manifest(tmp_path / "words.jsonl", ["two words"])) if suite == "tts" else ()
    options = ("--source", "librispeech", "--split", "dev-clean", *more)
    built = suite_of(suite, tmp_path / "LibriSpeech", *options)
    assert [one.text for one in built.samples] == [f"CHAPTER 121123 SENTENCE {number}" for number in range(2)]
    assert all(one.audio.is_file() for one in built.samples)
    assert built.set_name == "LibriSpeech dev-clean"
    folded = suite_of(suite, tmp_path / "LibriSpeech", *options, "--lower-case", "--limit", 1)
    assert [one.text for one in folded.samples] == ["chapter 121123 sentence 0"]


def test_a_source_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    sources.librispeech(tmp_path)
    (tmp_path / "dev-clean/84/121123/84-121123-0001.flac").unlink()
    refused = (
        re.escape(f"{tmp_path}: 1 of 2 records cannot be used, first ") + ".*84-121123.trans.txt, line 2: .*no such"
    )
    with pytest.raises(DataError, match=f"{refused}.*; most prepare manifest --source librispeech sets them aside"):
        suite_of("asr", tmp_path, "--source", "librispeech", "--split", "dev-clean")
    with pytest.raises(ConfigError, match="split test-clean: .* holds dev-clean, train-clean-100"):
        suite_of("asr", tmp_path, "--source", "librispeech", "--split", "test-clean")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text('{"text": "some words"}\n')
    with pytest.raises(ConfigError, match="--source text: has no audio to transcribe"):
        suite_of("asr", tmp_path / "texts", "--source", "text")


@pytest.mark.parametrize(
    ("suite", "options", "message"),
    [
        ("asr", ["--scorer", "duration"], "--scorer: is for --suite tts"),
        ("tts", ["--judge", "https://x/v1"], "--judge: is for --suite sqa"),
        ("sqa", ["--judge", "https://x/v1"], "--judge and --judge-model: each needs the other"),
        ("sqa", ["--judge-model", "x"], "--judge and --judge-model: each needs the other"),
        ("text", ["--source", "text"], "--source: is for --suite asr or tts"),
        ("asr", ["--text-field", "x"], "--audio-root, --text-field and --lower-case: need --source"),
        ("sqa", ["--split", "x"], "--split: is for --suite swuggy, sblimp or voicebench, or with --source"),
    ],
)
def test_options_that_do_not_fit_are_refused(suite: str, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        suite_of(suite, "absent", *options)


def test_scorers_compare_with_the_prompts_of_a_list(tmp_path: Path) -> None:
    published.write_sound(tmp_path / "prompt.wav", 0.5)
    (tmp_path / "meta.lst").write_text("u|a prompt|prompt.wav|some words\n")
    words = published.write_manifest(tmp_path / "words.jsonl", ["two words"])
    with pytest.raises(ConfigError, match="--scorer duration: .*meta.lst, line 1 has no audio to compare with"):
        suite_of("tts", tmp_path / "meta.lst", "--vocabulary", words, "--scorer", "duration")
    (tmp_path / "meta.lst").write_text("u|a prompt|prompt.wav|some words|prompt.wav\n")
    built = suite_of("tts", tmp_path / "meta.lst", "--vocabulary", words, "--scorer", "duration")
    assert built.settings["scorers"] == [{"scorer": "duration", "compared_with": "recording of the same text"}]
    manifest = published.write_manifest(tmp_path / "set.jsonl", ["some words"])
    assert suite_of("tts", manifest, "--scorer", "duration").settings["scorers"] == built.settings["scorers"]


def test_a_judge_is_told_by_address_and_model(tmp_path: Path) -> None:
    folder = published.open_audio_bench(tmp_path, "llama_questions")
    built = suite_of("sqa", folder, "--judge", "https://host/v1/", "--judge-model", "m")
    assert built.settings["judge"]["model"] == "m" and built.settings["judge"]["endpoint"] == "https://host/v1/"
    assert "judge" not in suite_of("sqa", folder).settings
