"""How generated speech is scored: values of every item, means, what they are compared with, and what fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from megatron_most.data.preparation.manifest import read_manifest
from megatron_most.errors import ConfigError, DataError
from megatron_most.evaluation.running import run_suite
from megatron_most.evaluation.scorers import SCORERS, Sound, load_scorer
from megatron_most.evaluation.scorers.duration import DurationRatio
from megatron_most.evaluation.scorers.scoring import Scoring
from megatron_most.evaluation.suites.meta_list import PROMPT_VOICE, read_meta_list
from megatron_most.evaluation.suites.speech import EvaluationSet, TtsSuite
from tests.unit.evaluation import published
from tests.unit.evaluation.stubs import StubModel
from tests.unit.evaluation.test_speech_suites import Deaf, record

TEXTS = ["the fox", "a dog", "the lazy dog", "foxes"]
FRAMES = 12


class Louder:
    """How much louder the speech is than the voice; refuses what is very loud."""

    name, compared_with = "louder 1.2", "voice"
    values = {"louder": -9.0}

    def __init__(self) -> None:
        self.heard: list[int] = []

    def score(self, spoken: Sound, reference: Sound | None) -> dict[str, float]:
        assert reference is not None and spoken.sample_rate == reference.sample_rate == 8000
        if spoken.audio.mean() > 0.8:
            raise DataError("too loud")
        return {"louder": float(spoken.audio.mean() - reference.audio.mean())}


class Alone:
    """Needs no recording, and gives two values."""

    name, compared_with = "alone 3", None
    values = {"alone_a": 1.0, "alone_b": 2.0}

    def score(self, spoken: Sound, reference: Sound | None) -> dict[str, float]:
        assert reference is None
        return {"alone_a": 4.0, "alone_b": float("nan") if spoken.audio.mean() > 0.8 else 3.0}


def speaks(loudness: list[int]) -> StubModel:
    """Twelve frames of each loudness, in turn."""
    left = iter(loudness)
    return StubModel(answer=lambda one: np.full((FRAMES, 3), next(left)))


def evaluate(manifest: Path, loudness: list[int], scorers: list[Any], output: Path | None = None) -> dict[str, Any]:
    records = read_manifest(manifest)
    scoring = Scoring(scorers, records)
    return run_suite(
        TtsSuite(EvaluationSet("set", records, "basic"), Deaf(), None, scoring), speaks(loudness), output, fresh=True
    )


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return published.write_manifest(tmp_path / "set.jsonl", TEXTS)


def seconds_of(manifest: Path) -> list[float]:
    return [soundfile.info(str(record.audio)).duration for record in read_manifest(manifest)]


def test_every_item_has_its_values_and_the_result_their_means(manifest: Path, tmp_path: Path) -> None:
    result = evaluate(manifest, [1, 2, 3, 4], [DurationRatio(), Alone()], tmp_path / "result.json")
    expected = [FRAMES * 100 / 8000 / seconds for seconds in seconds_of(manifest)]
    ratios = [item["scores"]["duration_ratio"] for item in result["items"]]
    assert ratios == pytest.approx(expected) and len(set(ratios)) == 4
    found = result["scores"]["duration_ratio"]
    assert found["score"] == pytest.approx(np.mean(expected))
    low, high = found["interval"]
    assert min(expected) <= low < found["score"] < high <= max(expected)
    assert (found["scorer"], found["compared_with"]) == ("duration", "recording of the same text")
    assert (found["num_failed"], found["failed"]) == (0, [])
    alone = result["scores"]["alone_a"]
    assert (alone["score"], alone["scorer"], alone["compared_with"]) == (4.0, "alone 3", None)
    assert result["settings"]["scorers"][1] == {"scorer": "alone 3", "compared_with": None}
    assert json.loads((tmp_path / "result.json").read_text())["scores"] == json.loads(json.dumps(result["scores"]))


def test_what_cannot_be_scored_counts_as_the_worst_and_is_listed(manifest: Path) -> None:
    published.damage(manifest.parent / "wavs" / "1.wav")
    result = evaluate(manifest, [1, 2, 3, 9], [Louder(), Alone(), DurationRatio()])
    found = result["scores"]["louder"]
    assert [one["id"] for one in found["failed"]] == ["1", "3"] and found["failed"][1]["failed"] == "too loud"
    values = [item["scores"].get("louder") for item in result["items"]]
    assert found["score"] == pytest.approx((values[0] + values[2] - 9.0 - 9.0) / 4)
    assert (found["num_failed"], found["failed_counts_as"]) == (2, -9.0)
    no_number = result["scores"]["alone_b"]
    assert no_number["failed"] == [{"id": "3", "failed": "alone 3 gives no number"}]
    assert no_number["score"] == pytest.approx((3 + 3 + 3 + 2) / 4)
    assert [one["id"] for one in result["scores"]["duration_ratio"]["failed"]] == ["1"]
    assert result["num_failed"] == 0, "words can be judged without a recording"


def test_speech_that_is_missing_counts_as_the_worst(manifest: Path) -> None:
    model = speaks([1, 1, 1, 1])
    model.context = 16  # the prompt of the longest text takes 18 positions
    scoring = Scoring([Alone()], read_manifest(manifest))
    suite = TtsSuite(EvaluationSet("set", read_manifest(manifest), "basic"), Deaf(), None, scoring)
    result = run_suite(suite, model)
    assert [one["id"] for one in result["failed"]] == ["2"]
    found = result["scores"]["alone_a"]
    assert found["failed"] == result["failed"]
    assert found["score"] == pytest.approx((4 * 3 + 1) / 4)


def test_a_list_of_prompts_gives_the_voice_and_its_recordings_the_length(tmp_path: Path) -> None:
    lines = []
    for number, loudness in enumerate((0.2, 0.6)):
        for kind in ("prompt", "truth"):
            published.write_sound(tmp_path / f"{kind}_{number}.wav", loudness if kind == "prompt" else 0.1, number)
        lines.append(f"u{number}|a prompt|prompt_{number}.wav|{TEXTS[number]}|truth_{number}.wav")
    (tmp_path / "meta.lst").write_text("\n".join(lines))
    entries = read_meta_list(tmp_path / "meta.lst")
    records, prompts = [one.record for one in entries], {one.record.id: one.prompt for one in entries}
    scoring = Scoring([Louder(), DurationRatio()], records, prompts, PROMPT_VOICE)
    result = run_suite(TtsSuite(EvaluationSet("set", records, "basic"), Deaf(), None, scoring), speaks([5, 5]))
    values = [item["scores"]["louder"] for item in result["items"]]
    assert values == pytest.approx([0.5 - 0.75 * 0.2, 0.5 - 0.75 * 0.6], abs=0.02)
    assert result["scores"]["louder"]["compared_with"] == "voice of the list's prompt, which the model is not given"
    assert result["scores"]["duration_ratio"]["compared_with"] == "recording of the same text"
    without = [record(one.record.id, one.record.text) for one in entries]
    with pytest.raises(ConfigError, match="--scorer duration: u0 has no audio to compare with"):
        Scoring([DurationRatio()], without, prompts)
    Scoring([Louder()], without, prompts)


def test_scorers_that_cannot_be_had_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert isinstance(load_scorer("duration"), DurationRatio)
    for named in ("wavlm", "duration=x", "xvector", "xvector="):
        with pytest.raises(ConfigError, match=f"--scorer {named}: must be one of {', '.join(SCORERS)}"):
            load_scorer(named)
    with pytest.raises(ConfigError, match="--scorer: alone 3 and alone 3 both give alone_a"):
        Scoring([Alone(), Alone()], [])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--scorer dnsmos: needs speechmos, which is not installed: pip install"):
        load_scorer("dnsmos")
    with pytest.raises(ConfigError, match="needs resemblyzer, .*: pip install --no-deps resemblyzer webrtcvad-wheels"):
        load_scorer("resemblyzer")


def test_a_ratio_needs_a_recording_with_sound() -> None:
    spoken, empty = Sound(np.ones(100), 8000), Sound(np.zeros(0), 8000)
    assert DurationRatio().score(spoken, Sound(np.ones(50), 16000)) == {"duration_ratio": 4.0}
    assert DurationRatio().score(empty, spoken) == {"duration_ratio": 0.0}
    with pytest.raises(DataError, match="has no sound"):
        DurationRatio().score(spoken, empty)
