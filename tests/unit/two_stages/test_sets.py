"""Evaluation sets and speech of two stages: the suites read them, and the same sentences give the same files."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from examples.two_stages import make_chat, make_sets
from megatron_most.data.preparation.chat_files import read_chats
from megatron_most.data.preparation.speechify import speak_chats
from megatron_most.evaluation.suites.questions import QuestionSuite
from megatron_most.evaluation.suites.stories import Salmon, StoryCloze
from megatron_most.evaluation.suites.zerospeech import Sblimp, Swuggy
from tests.pages import ROOT

SENTENCES = ["the red fox sees two small birds", "the black king sells nine golden chairs"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for name in ("train", "heldout_s"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    return folder


@pytest.fixture(scope="module")
def sets(corpus) -> Path:
    make_sets.make_sets(Namespace(corpus=corpus, output=corpus / "sets", count=2))
    return corpus / "sets"


def test_every_suite_reads_its_set_and_no_pair_is_a_tie(sets):
    suites = {
        Swuggy(sets / "sLM21-dataset"): 4,  # two words in two voices
        Sblimp(sets / "sLM21-dataset"): 4,
        StoryCloze(sets / "sSC"): 2,
        StoryCloze(sets / "tSC"): 2,
        Salmon(sets / "salmon_benchmark"): 16,
    }
    for suite, count in suites.items():
        assert len(suite.samples) == count, suite.name
        for pair in suite.samples:
            sounds = [soundfile.read(path)[0] for path in (pair.positive, pair.negative)]
            assert len(sounds[0]) != len(sounds[1]) or np.abs(sounds[0] - sounds[1]).max() > 0.01, pair.id
            assert all(0.3 < np.abs(sound).max() < 1 for sound in sounds), pair.id
    questions = QuestionSuite(sets / "eval_datas" / "web_questions").samples
    assert [set(one.answers) for one in questions] and all(
        one.answers[0] in one.text and one.audio.is_file() for one in questions
    )


def test_the_same_sentences_give_the_same_files(corpus, sets):
    make_sets.make_sets(Namespace(corpus=corpus, output=corpus / "again", count=2))
    files = sorted(path.relative_to(sets) for path in sets.rglob("*") if path.is_file())
    assert len(files) > 60
    for name in files:
        assert (sets / name).read_bytes() == (corpus / "again" / name).read_bytes(), name


def test_conversations_are_spoken_by_one_process_for_all_turns(corpus, monkeypatch):
    make_chat.make_chat(Namespace(corpus=corpus, output=corpus / "chat", conversations=3))
    chats = list(read_chats(corpus / "chat" / "chat.jsonl"))
    assert len(chats) == 3
    texts = (corpus / "chat" / "texts.jsonl").read_text()
    assert all(message.content in texts for chat in chats for message in chat.messages())
    assert "Answer in writing." in texts and "Answer aloud." in texts
    monkeypatch.chdir(ROOT)
    command = f"{sys.executable} examples/two_stages/synthesizer.py"
    counts = speak_chats(corpus / "chat" / "chat.jsonl", corpus / "spoken", command, workers=1)
    assert counts == {"spoken": 6, "written": 0, "failed": 0}


def test_the_synthesizer_speaks_a_text_the_same_way_again(tmp_path):
    turns = [{"text": SENTENCES[0], "voice": voice, "role": "user"} for voice in ("", "", "en-us+f4")]
    lines = [json.dumps({**turn, "output": str(tmp_path / f"{place}.wav")}) for place, turn in enumerate(turns)]
    command = [sys.executable, "examples/two_stages/synthesizer.py"]
    done = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "{}\n" * 3, done.stderr
    sounds = [(tmp_path / f"{place}.wav").read_bytes() for place in range(3)]
    assert sounds[0] == sounds[1] != sounds[2]
