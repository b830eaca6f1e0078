"""sWUGGY, sBLIMP, StoryCloze and SALMon: layouts, scores, and what is missing or broken."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from megatron_most.errors import ConfigError, DataError
from megatron_most.evaluation.running import run_suite
from megatron_most.evaluation.suites.pairs import READINGS
from megatron_most.evaluation.suites.stories import Salmon, StoryCloze
from megatron_most.evaluation.suites.zerospeech import Sblimp, Swuggy
from tests.unit.evaluation import published
from tests.unit.evaluation.stubs import StubModel, guess, knows_loudness

SUITES = {
    "swuggy": (published.zerospeech, Swuggy, "lexical/dev/l001A1x.wav", 16),
    "sblimp": (published.zerospeech, Sblimp, "syntactic/dev/s002B0x.wav", 16),
    "storycloze": (published.numbered_stories, StoryCloze, "2_story.wav", 8),
    "triples": (published.story_triples, StoryCloze, "1_incorrect.wav", 8),
    "salmon": (published.salmon, Salmon, "rir_consistency/sample_1_0.wav", 32),
}
"""Maker, suite, one of its files, and the number of pairs with 8 (4 for SALMon) of each kind."""


@pytest.fixture(params=SUITES)
def case(request, tmp_path):
    make, suite, file, count = SUITES[request.param]
    root = make(tmp_path / "sSC", 4 if request.param == "salmon" else 8)
    return root, suite, root / file, count


def test_a_model_that_knows_scores_everything_and_one_that_is_wrong_nothing(case):
    root, suite, _, count = case
    result = run_suite(suite(root), StubModel(knows_loudness))
    assert (result["score"], result["num_failed"], result["num_samples"]) == (1.0, 0, count)
    assert set(result["readings"]) == set(READINGS)
    assert run_suite(suite(root), StubModel(lambda one: -knows_loudness(one)))["score"] == 0.0
    assert run_suite(suite(root), StubModel(lambda one: -1.0))["readings"]["own_mean"]["score"] == 0.5


def test_a_damaged_or_missing_file_lowers_the_score_by_exactly_its_share(case):
    root, suite, file, count = case
    units = 8 if suite in (Swuggy, Sblimp) else count
    share = (count // units) * units  # pairs, or voices of a pair
    published.damage(file)
    result = run_suite(suite(root), StubModel(knows_loudness))
    assert result["score"] == pytest.approx(1 - 1 / share)
    [failed] = result["failed"]
    assert file.name in failed["failed"]
    file.unlink()
    if not (root / "lexical").is_dir() and "correct" not in file.name:  # only the other files could tell of it
        with pytest.raises(DataError, match="must have"):
            suite(root)
        return
    missing = run_suite(suite(root), StubModel(knows_loudness))
    assert missing["score"] == result["score"] and "no such audio file" in missing["failed"][0]["failed"]
    assert all(one["score"] == result["score"] for one in result["readings"].values())


@pytest.mark.parametrize("name", ["swuggy", "storycloze", "salmon"])
def test_a_model_that_guesses_scores_chance_within_its_interval(name, tmp_path):
    make, suite, _, _ = SUITES[name]
    result = run_suite(suite(make(tmp_path / "many", 12 if name == "salmon" else 60)), StubModel(guess))
    low, high = result["interval"]
    assert low <= result["chance"] <= high and 0 < low < high < 1


def test_recordings_with_the_same_codes_are_a_tie_whatever_the_rounding(tmp_path):
    root = published.numbered_stories(tmp_path / "sSC", 1)
    (root / "1_story.wav").write_bytes((root / "0_story.wav").read_bytes())
    rounding = iter([-1.0, -1.0000001])
    assert run_suite(StoryCloze(root), StubModel(lambda one: next(rounding)))["score"] == 0.5


def test_voices_are_averaged_before_pairs_and_bands_are_the_official_ones(tmp_path):
    root = published.zerospeech(tmp_path, 4)
    published.damage(root / "lexical/dev/l000A1x.wav")
    result = run_suite(Swuggy(root), StubModel(knows_loudness))
    assert result["num_units"] == 4 and result["score"] == pytest.approx(7 / 8)
    bands = result["breakdown"]["frequency"]
    assert {name: (one["score"], one["num_units"]) for name, one in bands.items()} == {
        "oov": (0.5, 1),
        "1-5": (1.0, 1),
        "6-20": (1.0, 1),  # seen 5 times: the official scorer counts it here
        ">100": (1.0, 1),
    }
    assert result["breakdown"]["vocabulary"]["in"] == {"score": 1.0, "num_units": 3}
    assert result["breakdown"]["voice"]["A"]["score"] == 0.75
    kinds = run_suite(Sblimp(root), StubModel(knows_loudness))["breakdown"]["type"]
    assert {name: one["num_units"] for name, one in kinds.items()} == {"t0": 2, "t1": 2}


def official_score(gold: Path, submission: Path, unit: tuple[str, ...]) -> float:
    """By the definition in the challenge's documentation: 1 or 0.5, mean over voices, then over pairs."""
    scores = dict(line.split(" ") for line in submission.read_text().splitlines())
    rows = list(csv.DictReader(gold.open()))
    assert {row["filename"] for row in rows} == set(scores)
    sides: dict[tuple, dict[str, float]] = {}
    for row in rows:
        key = (*(row[name] for name in unit), row["voice"])
        sides.setdefault(key, {})[row["correct"]] = float(scores[row["filename"]])
    of_pairs: dict[tuple, list[float]] = {}
    for key, side in sides.items():
        value = 0.5 if side["1"] == side["0"] else float(side["1"] > side["0"])
        of_pairs.setdefault(key[:-1], []).append(value)
    means = [sum(values) / len(values) for values in of_pairs.values()]
    return sum(means) / len(means)


@pytest.mark.parametrize("suite", [Swuggy, Sblimp])
@pytest.mark.parametrize("split", ["dev", "test"])
def test_a_submission_gives_the_same_score_and_a_failed_pair_is_wrong_in_it(suite, split, tmp_path):
    root = published.zerospeech(tmp_path / "data", 12, split)
    prefix = "l" if suite is Swuggy else "s"
    published.damage(root / suite.folder / split / f"{prefix}003A0x.wav")  # the incorrect one
    output = tmp_path / "result.json"
    result = run_suite(suite(root, split), StubModel(guess), output)
    submission = tmp_path / "result.submission" / suite.folder / f"{split}.txt"
    unit = ("id",) if suite is Swuggy else ("type", "subtype", "id")
    assert official_score(root / suite.folder / split / "gold.csv", submission, unit) == pytest.approx(result["score"])
    assert result["num_failed"] == 1 and 0 < result["score"] < 1


def test_stories_can_be_written_and_spoken(tmp_path):
    root = published.story_triples(tmp_path / "tSC", 4)

    def likes_the_right_text(document) -> float:
        text = "".join(chr(token + 94) for token in document.ids[document.loss_mask] if 3 <= token < 29)
        return -1.0 if text.startswith("correct") else -2.0

    written = run_suite(StoryCloze(root, "S-T"), StubModel(likes_the_right_text))
    assert (written["score"], written["set"]) == (1.0, "tSC S-T")
    assert run_suite(StoryCloze(root, "T-T"), StubModel(likes_the_right_text))["score"] == 1.0
    assert run_suite(StoryCloze(root, "T-S"), StubModel(knows_loudness))["score"] == 1.0
    (root / "0_mutual.txt").unlink()
    assert run_suite(StoryCloze(root, "T-S"), StubModel(knows_loudness))["score"] == 0.75


def test_a_recording_longer_than_the_context_is_wrong(tmp_path):
    root = published.numbered_stories(tmp_path / "sSC", 2)
    with pytest.raises(DataError, match="no sample could be judged: .* do not fit: data.seq_length is 8"):
        run_suite(StoryCloze(root), StubModel(knows_loudness, context=8))


def refused(make, match: str, error: type[Exception] = DataError) -> None:
    with pytest.raises(error, match=match):
        make()


def test_an_incomplete_data_set_is_refused_by_name(tmp_path):
    root = published.zerospeech(tmp_path / "data")
    gold = root / "lexical/dev/gold.csv"
    lines = gold.read_text().splitlines(keepends=True)
    gold.write_text("".join(lines[:-1]))
    refused(lambda: Swuggy(root), "gold.csv: id 3, voice B: has 1 correct and 0 incorrect rows, must have one of each")
    gold.write_text(lines[0].replace("frequency", "count") + "".join(lines[1:]))
    refused(lambda: Swuggy(root), "gold.csv: has no column 'frequency'")
    gold.write_text(lines[0] + lines[1].rstrip()[:-1] + "2\n")
    refused(lambda: Swuggy(root), "gold.csv, line 2: correct='2': must be 0 or 1")
    gold.write_text(lines[0])
    refused(lambda: Swuggy(root), "gold.csv: has no rows")
    refused(lambda: Swuggy(root, "test"), "lexical/test/gold.csv: no such file")
    refused(lambda: Swuggy(root, "train"), "--split=train: must be one of dev, test", ConfigError)

    stories = published.numbered_stories(tmp_path / "sSC")
    published.write_sound(stories / "8_story.wav", 0.5)
    refused(lambda: StoryCloze(stories), "sSC: holds 9 stories; each must have its counterpart")
    published.write_sound(stories / "8_other.wav", 0.5)
    refused(lambda: StoryCloze(stories), "sSC: number 8 occurs twice")
    published.write_sound(stories / "story.wav", 0.5)
    refused(lambda: StoryCloze(stories), "story.wav: part 1 of its name, between underscores, must be a number")
    refused(lambda: StoryCloze(stories, "S-X"), "--modalities=S-X", ConfigError)
    refused(lambda: StoryCloze(published.numbered_stories(tmp_path / "t"), "T-S"), "whole stories alone", ConfigError)
    (tmp_path / "empty").mkdir()
    refused(lambda: StoryCloze(tmp_path / "empty"), "empty: holds no stories")

    sounds = published.salmon(tmp_path / "salmon")
    published.write_sound(sounds / "bg_alignment/sample_0_2.wav", 0.5)
    refused(lambda: Salmon(sounds), "bg_alignment: sample 0 has 3 files, must have 2")
    refused(lambda: Salmon(tmp_path), "bg_alignment: no such folder; SALMon has bg_alignment, bg_all_consistency")
