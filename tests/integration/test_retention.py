"""Text retention: measured in training, in every layout what an evaluation says, and a warning past the limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_most.config import RunConfig
from megatron_most.errors import ConfigError, DataError
from megatron_most.evaluation.interface import load_model
from megatron_most.evaluation.running import run_suite
from megatron_most.evaluation.suites.text import TextSuite
from megatron_most.training.retention import RETENTION, read_retention_text
from tests.distributed.harness import run_ranks
from tests.integration.tiny_run import assert_same_weights, metric_lines, run_config, train
from tests.unit.evaluation.stubs import write_tokenizer

TEXTS = ["the fox and the dog", "a", "the quick brown fox jumps over the lazy dog, and the dog and the fox sleep " * 2]
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank, packed": (1, {"data__packing": True}),
    "data": (2, {}),
    "expert": (2, {"parallel__expert_model_parallel_size": 2}),
    "tensor": (2, {"parallel__tensor_model_parallel_size": 2}),
    "virtual pipeline": (
        2,
        {"parallel__pipeline_model_parallel_size": 2, "parallel__virtual_pipeline_model_parallel_size": 2},
    ),
    "context, packed": (
        2,
        {"parallel__context_parallel_size": 2, "data__packing": True, "data__document_multiple": 4},
    ),
}

FAST = ("one rank, packed", "data", "expert")


def retention_config(folder: Path, name: str = "run", text: str = "text.jsonl", **overrides: Any) -> RunConfig:
    """A run that measures three texts, of which the last is longer than a row."""
    if not (folder / "tokenizer").exists():
        write_tokenizer(folder / "tokenizer")
        lines = [json.dumps({"id": str(place), "text": text.strip()}) for place, text in enumerate(TEXTS)]
        (folder / "text.jsonl").write_text("\n".join(lines))
        (folder / "other.txt").write_text(TEXTS[0])
    options = {
        "tokenizer": folder / "tokenizer",
        "training__retention__data": folder / text,
        "training__retention__interval": 2,
        "training__eval_interval": 0,
    }
    return run_config(folder, name, **{**options, **overrides})


def measured(config: RunConfig) -> dict[int, float]:
    """Step -> bits per byte."""
    key = "retention/bits_per_byte"
    lines = [line for line in metric_lines(config) if key in line]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: line[key] for line in lines}


def evaluated(run_dir: str, text: Path) -> dict[str, Any]:
    return run_suite(TextSuite(text), load_model(run_dir, needs_codec=False))


def test_what_is_measured_is_what_an_evaluation_of_the_checkpoint_says(tmp_path: Path) -> None:
    config = retention_config(tmp_path, training__train_iters=3)
    run_ranks(1, train, config)
    found = measured(config)
    assert list(found) == [0, 2, 3]
    [result] = run_ranks(1, evaluated, config.run_dir, tmp_path / "text.jsonl")
    assert found[3] == pytest.approx(result["whole"]["bits_per_byte"], rel=1e-5)
    last = [line for line in metric_lines(config) if line["step"] == 3 and "retention/perplexity" in line]
    assert last[0]["retention/perplexity"] == pytest.approx(result["whole"]["perplexity"], rel=1e-5)
    start = json.loads((Path(config.run_dir) / RETENTION).read_text())
    assert (start["step"], start["bits_per_byte"]) == (0, found[0])


def test_measuring_changes_nothing_in_training(tmp_path: Path) -> None:
    with_text = retention_config(tmp_path, training__train_iters=3)
    without = retention_config(tmp_path, "without", training__train_iters=3, training__retention__data="null")
    assert_same_weights(run_ranks(1, train, with_text), run_ranks(1, train, without))
    assert [line for line in metric_lines(with_text) if "loss" in line] == metric_lines(without)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run to begin others with: initial weights differ between layouts."""
    config = retention_config(tmp_path_factory.mktemp("source"), training__train_iters=2, optimizer__lr_warmup_iters=1)
    run_ranks(1, train, config)
    return config


@pytest.mark.invariance
@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_every_layout_measures_the_same(name: str, source: RunConfig, tmp_path: Path) -> None:
    world_size, overrides = LAYOUTS[name]
    start = {"checkpoint__load": source.run_dir, "training__train_iters": 1, "optimizer__lr_warmup_iters": 0}
    config = retention_config(tmp_path, **start, **overrides)
    run_ranks(world_size, train, config)
    assert measured(config)[0] == pytest.approx(measured(source)[2], rel=1e-5)


def test_a_resumed_run_compares_with_its_start_and_an_edited_text_with_its_own(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = retention_config(tmp_path, training__train_iters=3)
    run_ranks(1, train, first)
    begun = (Path(first.run_dir) / RETENTION).read_text()
    capfd.readouterr()
    resumed = retention_config(tmp_path)
    run_ranks(1, train, resumed)
    assert list(measured(resumed)) == [0, 2, 3, 4, 6]  # the last step of the first process, too
    assert (Path(resumed.run_dir) / RETENTION).read_text() == begun
    assert "since step 0" in capfd.readouterr().out
    other = retention_config(tmp_path, text="other.txt", training__train_iters=7)
    run_ranks(1, train, other)
    printed = capfd.readouterr().out
    assert f"warning: {Path(other.run_dir) / RETENTION}: is of another text; text retention starts anew" in printed
    assert "step 7  text retention" in printed and "since step 6" in printed


def test_the_warning_comes_where_the_limit_is_passed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = retention_config(
        tmp_path, training__retention__limit=0.02, training__retention__interval=1, optimizer__lr=0.1
    )
    run_ranks(1, train, config)
    printed, found = capfd.readouterr().out, measured(config)
    passed = [step for step, value in found.items() if value > found[0] * 1.02]
    assert passed, "this learning rate makes the text less likely"
    warned = [line for line in printed.splitlines() if line.startswith("warning: step")]
    assert [int(line.split()[2].rstrip(":")) for line in warned] == passed
    assert warned[0].endswith("since step 0; training.retention.limit=0.02 allows +2.00%")


def test_misuse_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="training.retention.data=.*: needs tokenizer"):
        retention_config(tmp_path, tokenizer="null")
    with pytest.raises(ConfigError, match=r"training.retention.interval=0: must be greater than 0"):
        retention_config(tmp_path, training__retention__interval=0)
    with pytest.raises(ConfigError, match=r"training.retention.limit=-1.0: must not be negative"):
        retention_config(tmp_path, training__retention__limit=-1)
    with pytest.raises(DataError, match="absent.txt: no such file"):
        read_retention_text(retention_config(tmp_path, text="absent.txt"), dp_rank=0, dp_size=1)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"training.retention.data=.*: empty.txt: text is empty"):
        read_retention_text(retention_config(tmp_path, text="empty.txt"), dp_rank=0, dp_size=1)
    small = retention_config(tmp_path, "small")
    small.vocab.text_vocab_size = 20
    with pytest.raises(DataError, match="text id [0-9]+ is outside the layout's 20 text ids"):
        read_retention_text(small, dp_rank=0, dp_size=1)
