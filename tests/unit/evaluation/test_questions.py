"""Spoken questions in the published layouts, answered in writing and aloud."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from megatron_most.data.building.special_tokens import special_tokens
from megatron_most.errors import DataError
from megatron_most.evaluation.running import run_suite
from megatron_most.evaluation.suites.questions import QuestionSuite
from tests.unit.data.tiny import LetterTokenizer, layout
from tests.unit.evaluation import published
from tests.unit.evaluation.stubs import StubModel

LAYOUTS = {
    **{name: lambda root, name=name: published.open_audio_bench(root, name) for name in published.COLUMNS},
    "parquet": published.ultra_eval_audio,
    "parquet of llama questions": lambda root: published.ultra_eval_audio(root, "Answer"),
}


def number_of(prompt) -> int:
    """Which question is asked: each is louder than the one before."""
    return int(
        np.argmin([abs(prompt.codes[:, 0].mean() - 10 * 0.75 * (0.1 + 0.2 * number) + 0.5) for number in range(4)])
    )


def knows(prompt) -> str:
    return f"I would say {published.QUESTIONS[number_of(prompt)][1][0]}, of course."


@pytest.fixture(params=LAYOUTS)
def folder(request, tmp_path):
    return LAYOUTS[request.param](tmp_path)


def test_a_model_that_knows_answers_everything_and_one_that_does_not_nothing(folder):
    result = run_suite(QuestionSuite(folder), StubModel(answer=knows))
    assert (result["score"], result["num_samples"], result["metric"]) == (1.0, 4, "has_answer")
    assert result["exact_match"]["score"] == 0.0
    exact = run_suite(QuestionSuite(folder), StubModel(answer=lambda one: published.QUESTIONS[number_of(one)][1][0]))
    assert exact["exact_match"]["score"] == exact["exact_match_of_first"]["score"] == 1.0
    assert run_suite(QuestionSuite(folder), StubModel(answer=lambda one: "I do not know"))["score"] == 0.0


def test_any_alias_counts_but_the_first_alone_in_its_own_score(tmp_path):
    folder = published.open_audio_bench(tmp_path, "trivia_qa")
    result = run_suite(QuestionSuite(folder), StubModel(answer=lambda one: published.QUESTIONS[number_of(one)][1][-1]))
    assert result["score"] == 1.0
    assert (result["exact_match"]["score"], result["exact_match_of_first"]["score"]) == (1.0, 0.5)


def test_a_damaged_recording_lowers_the_score_by_its_share(tmp_path):
    folder = published.open_audio_bench(tmp_path, "web_questions")
    published.damage(folder / "audios" / "web_questions_2.wav")
    output = tmp_path / "result.json"
    result = run_suite(QuestionSuite(folder), StubModel(answer=knows), output)
    assert result["score"] == 0.75
    assert [one["id"] for one in result["failed"]] == ["web_questions/2"]
    (folder / "audios" / "web_questions_2.wav").unlink()
    assert run_suite(QuestionSuite(folder), StubModel(answer=knows))["score"] == 0.75


def test_spoken_answers_are_judged_by_what_a_recognizer_hears(tmp_path):
    class Listener:
        name = "listener"

        def transcribe(self, audio, sample_rate):
            if audio[0] > 0.5:
                raise DataError("too loud")
            return "Paris"

    spoken = iter([2, 2, 2, 8])
    model = StubModel(answer=lambda one: np.full((3, 3), next(spoken)))
    result = run_suite(QuestionSuite(published.open_audio_bench(tmp_path, "llama_questions"), None, Listener()), model)
    assert result["score"] == 0.25 and result["set"] == "llama_questions S-S"
    assert result["settings"]["recognizer"] == "listener"
    assert [one["failed"] for one in result["failed"]] == ["too loud"]


def test_a_question_is_a_turn_of_the_user_and_the_answer_the_assistants(tmp_path):
    seen = []
    folder = published.open_audio_bench(tmp_path, "llama_questions")
    run_suite(QuestionSuite(folder, limit=1), StubModel(answer=lambda one: seen.append(one) or ""))
    [prompt] = seen
    roles = special_tokens(layout(), LetterTokenizer(), roles=True)
    assert prompt.ids[:3].tolist() == [roles["bos"], roles["user"], layout().begin_of_audio]
    assert prompt.ids[-1] == roles["assistant"]


def test_tables_that_lack_something_are_refused_by_name(tmp_path):
    folder = published.open_audio_bench(tmp_path, "llama_questions")
    table = folder / "llama_questions.csv"
    rows = list(csv.DictReader(table.open()))
    published.write_csv(table, [{**row, "Answer": "" if place == 1 else "x"} for place, row in enumerate(rows)])
    with pytest.raises(DataError, match="llama_questions.csv, row 2: has no answer in Answer, answers"):
        QuestionSuite(folder)
    published.write_csv(table, [{"Questions": "q", "Answer": "x"}])
    with pytest.raises(DataError, match="row 1: has no audio in audio_filename or audio"):
        QuestionSuite(folder)
    table.unlink()
    with pytest.raises(DataError, match="holds neither llama_questions.csv nor Parquet files"):
        QuestionSuite(folder)
    with pytest.raises(DataError, match="absent: no such file or folder"):
        QuestionSuite(tmp_path / "absent")
    (tmp_path / "x.parquet").write_bytes(b"no Parquet")
    with pytest.raises(DataError, match="x.parquet: not readable as Parquet"):
        QuestionSuite(tmp_path / "x.parquet")
