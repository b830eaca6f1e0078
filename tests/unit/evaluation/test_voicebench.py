"""VoiceBench: its Parquet files in, its JSON lines out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megatron_most.errors import DataError
from megatron_most.evaluation.running import run_suite
from megatron_most.evaluation.suites.voicebench import VoiceBenchSuite
from tests.unit.evaluation import published
from tests.unit.evaluation.stubs import StubModel

COLUMNS: dict[str, list[dict[str, Any]]] = {
    "alpacaeval": [{"prompt": f"request {number}", "output": "text"} for number in range(3)],
    "sd-qa": [{"prompt": "Wer?", "reference": "Käse", "id": "x-1"}],
    "ifeval": [
        {
            "key": 1000,
            "prompt": "Write two words.",
            "instruction_id_list": ["length_constraints:number_words", "punctuation:no_comma"],
            "kwargs": [{"num_words": 2, "relation": "less than"}, {"num_words": None, "relation": None}],
        }
    ],
}
"""Columns beside the audio, as the data set's subsets have them."""


def write_subset(root: Path, subset: str, split: str = "test", **changed: Any) -> Path:
    rows = []
    for number, columns in enumerate(COLUMNS[subset]):
        sound = write_sound(root, number)
        rows.append({**columns, "audio": {"bytes": sound.read_bytes(), "path": None}, **changed})
    (root / subset).mkdir(exist_ok=True)
    table = pyarrow.Table.from_pylist([{k: v for k, v in row.items() if v is not ...} for row in rows])
    pyarrow.parquet.write_table(table, root / subset / f"{split}-00000-of-00001.parquet")
    return root / subset


def write_sound(root: Path, number: int) -> Path:
    return published.write_sound(root / "sounds" / f"{number}.wav", 0.1 + 0.2 * number, number)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("subset", COLUMNS)
def test_answers_are_lines_of_all_columns_but_the_audio(subset: str, tmp_path: Path) -> None:
    split = "aus" if subset == "sd-qa" else "test"
    folder, output = write_subset(tmp_path, subset, split), tmp_path / "x" / "answers.json"
    output.parent.mkdir()
    result = run_suite(VoiceBenchSuite(folder, split), StubModel(answer=lambda one: "ja, Käse"), output)
    written = lines(output.with_suffix(".voicebench.jsonl"))
    assert written == [{**columns, "response": "ja, Käse"} for columns in COLUMNS[subset]]
    assert result["files"] == ["answers.results.jsonl", "answers.voicebench.jsonl"]
    assert (result["suite"], result["set"], result["metric"]) == ("voicebench", f"{subset} {split} S-T", "answered")
    assert (result["score"], result["num_samples"]) == (1.0, len(written)) and "nobody yet" in result["scored_by"]


def test_a_request_that_fails_is_listed_and_has_an_empty_response(tmp_path: Path) -> None:
    folder, output = write_subset(tmp_path, "alpacaeval"), tmp_path / "answers.json"
    table = pyarrow.parquet.read_table(folder / "test-00000-of-00001.parquet").to_pylist()
    table[1]["audio"]["bytes"] = table[1]["audio"]["bytes"][:60]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), folder / "test-00000-of-00001.parquet")
    result = run_suite(VoiceBenchSuite(folder), StubModel(answer=lambda one: "yes"), output)
    assert [one["id"] for one in result["failed"]] == ["test-00000-of-00001/1"]
    assert result["score"] == pytest.approx(2 / 3)
    assert [line["response"] for line in lines(output.with_suffix(".voicebench.jsonl"))] == ["yes", "", "yes"]


def test_spoken_answers_are_what_a_recognizer_hears(tmp_path: Path) -> None:
    class Listener:
        name = "listener"

        def transcribe(self, audio: np.ndarray, sample_rate: int) -> str:
            return f"heard {audio[0]:.1f}"

    output = tmp_path / "answers.json"
    suite = VoiceBenchSuite(write_subset(tmp_path, "alpacaeval"), recognizer=Listener(), limit=2)
    result = run_suite(suite, StubModel(answer=lambda one: np.full((3, 3), 4)), output)
    assert [line["response"] for line in lines(output.with_suffix(".voicebench.jsonl"))] == ["heard 0.4"] * 2
    assert result["set"] == "alpacaeval test S-S" and result["settings"]["recognizer"] == "listener"


def test_what_is_no_subset_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_subset(tmp_path, "sd-qa", "usa")
    with pytest.raises(DataError, match=r"sd-qa: holds no test-\*.parquet; splits there: usa"):
        VoiceBenchSuite(folder)
    with pytest.raises(DataError, match="row 1: needs audio and a prompt .the conversations of mtbench"):
        VoiceBenchSuite(write_subset(tmp_path, "alpacaeval", prompt=...))
    with pytest.raises(DataError, match="row 1: needs audio and a prompt"):
        VoiceBenchSuite(write_subset(tmp_path, "alpacaeval", audio=...))
    with pytest.raises(DataError, match="row 1: cannot be written as JSON"):
        VoiceBenchSuite(write_subset(tmp_path, "alpacaeval", other=b"bytes"))
    with pytest.raises(DataError, match="row 1: has a response already"):
        VoiceBenchSuite(write_subset(tmp_path, "alpacaeval", response="x"))
    with pytest.raises(DataError, match="absent: no such file or folder"):
        VoiceBenchSuite(tmp_path / "absent")
