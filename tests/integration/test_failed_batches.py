"""A step that is not finite: its documents are recorded, the batch runs alone, and up to so many steps are skipped."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_most.checkpointing import read_metadata
from megatron_most.commands.train import main
from megatron_most.config import RunConfig
from megatron_most.data.loading.loader import train_rows
from megatron_most.data.storage.token_dataset import DatasetWriter, TokenDataset
from megatron_most.errors import MostError
from megatron_most.training import Trainer
from megatron_most.training.replay import read_failed_batch
from tests.distributed.harness import run_ranks
from tests.integration.test_skipped_steps import LAYOUTS, TP, lines_of, weights_of
from tests.integration.tiny_run import BeforeStep, metric_lines, run_config, train

POISON = 39
"""A text id that only the poisoned documents hold; its embedding is NaN."""
ROWS = (9, 13)
"""The rows of the poisoned documents: one in step 3, one in step 4."""
OPTIONS = {
    "logging__log_interval": 1,
    "checkpoint__save_interval": 1,
    "checkpoint__keep_last": 9,
    "training__eval_interval": 0,
    "model__moe__moe_router_bias_update_rate": 1e-3,
}
LIMIT = "training__skip_nonfinite_steps"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose datasets hold two poisoned documents."""
    directory = tmp_path_factory.mktemp("poisoned")
    config = run_config(directory)
    sources = [train_rows(config).sources(row) for row in ROWS]
    for prefix in {entry.path for entry in config.data.train}:
        documents = list(TokenDataset(prefix))
        task = TokenDataset(prefix).task
        for document in documents:
            document.ids[document.ids == POISON] = POISON - 1
        for source in sources:
            if source.dataset == prefix:
                documents[source.documents[0]].ids[-2] = POISON
        with DatasetWriter(prefix, task, config.vocab) as writer:
            for document in documents:
                writer.add(document)
            writer.commit({})
    return directory


def poison(trainer: Trainer) -> None:
    chunk = trainer.state.model_chunks[0]
    if chunk.pre_process:
        table = chunk.embedding.word_embeddings
        if table.vocab_start_index <= POISON < table.vocab_end_index:
            with torch.no_grad():
                table.weight[POISON - table.vocab_start_index] = float("nan")


class Poison(BeforeStep):
    def __init__(self) -> None:
        self.step = 1

    def before_step(self, trainer: Trainer) -> None:
        if trainer.state.step == 0:
            poison(trainer)


def outcome(config: RunConfig) -> str:
    """What a poisoned run printed, and how it ended on this rank."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            train(config, Poison())
        except MostError as error:
            return f"{out.getvalue()}error: {error}"
        except SystemExit as error:
            return f"status {error.code}"
    return out.getvalue()


def replayed(path: Path, *overrides: str) -> str:
    """What ``most train --replay`` prints on this rank."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), contextlib.suppress(SystemExit):
        main(["--replay", str(path), *overrides])
    return out.getvalue()


def record_of(config: RunConfig, step: int) -> Path:
    return Path(config.run_dir) / "failed_batches" / f"step_{step:08d}.json"


def test_the_run_ends_and_the_batch_runs_alone(folder: Path) -> None:
    config = run_config(folder, "ends", **OPTIONS)
    error, other = run_ranks(2, outcome, config)
    path = record_of(config, 3)
    assert "error: step 3: the loss is nan; nothing of this step was saved" in error and str(path) in error
    assert other == "status 1"
    assert [path.name for path in sorted(Path(config.run_dir, "checkpoints").iterdir())][-1] == "step_00000002"

    record = json.loads(path.read_text())
    rows = train_rows(config)
    assert [row["row"] for row in record["rows"]] == [8, 9, 10, 11]
    for row in record["rows"]:
        assert {**row, "loss": 0} == {**vars(rows.sources(row["row"])), "loss": 0}
        assert (row["loss"] == "nan") == (row["row"] == ROWS[0])
        [index], dataset = row["documents"], TokenDataset(row["dataset"])
        assert (POISON in dataset.document(index).ids) == (row["row"] == ROWS[0])

    before = sorted(str(path) for path in Path(config.run_dir).rglob("*"))
    [alone] = run_ranks(1, replayed, path)
    assert f"step 3 of {config.run_dir}: the loss is nan; weights: {config.run_dir}/checkpoints/step_00000002" in alone
    assert f"loss nan  row 9: {record['rows'][1]['dataset']}" in alone
    assert [float(loss) for loss in re.findall(r"^loss (\S+)  row (?!9)", alone, re.MULTILINE)] == pytest.approx(
        [row["loss"] for row in record["rows"] if row["row"] != ROWS[0]], abs=1e-4
    )
    assert re.search(r"^grad_norm/attention\s+nan$", alone, re.MULTILINE)
    assert sorted(str(path) for path in Path(config.run_dir).rglob("*")) == before
    in_two, nothing = run_ranks(2, replayed, path, f"{TP.replace('__', '.')}=2")
    assert re.sub(r"\d\.\d+", "", in_two) == re.sub(r"\d\.\d+", "", alone) and nothing == ""

    [clean] = run_ranks(1, replayed, path, f"checkpoint.load={first_weights(folder)}")
    assert "nan" not in clean.replace("the loss is nan", "")


def first_weights(folder: Path) -> Path:
    """A checkpoint of the first step of a run without poison."""
    config = run_config(folder, "clean", **OPTIONS, training__train_iters=3)
    if not Path(config.run_dir).exists():
        run_ranks(1, train, config)
    return Path(config.run_dir) / "checkpoints" / "step_00000001"


def start(folder: Path) -> dict[str, str]:
    return {"checkpoint__load": str(first_weights(folder))}


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> tuple[RunConfig, str]:
    config = run_config(folder, "one-rank", **OPTIONS, **start(folder), **{LIMIT: 2})
    [out] = run_ranks(1, outcome, config)
    return config, out


def test_a_skipped_step_changes_nothing_but_what_it_consumed(one_rank: tuple[RunConfig, str]) -> None:
    config, out = one_rank
    lines = lines_of_all(config)
    assert "step 3  skipped: the loss is nan\n" in out and str(record_of(config, 3)) in out and "loss - ()" in out
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 2, 2, 2]
    assert [line["consumed_samples"] for line in lines] == [4, 8, 12, 16, 20, 24]
    assert [("loss" in line, "grad_norm" in line, "grad_norm/attention" in line) for line in lines] == [
        (is_finite,) * 3 for is_finite in (True, True, False, False, True, True)
    ]
    assert [read_metadata(step).nonfinite_steps for step in checkpoints(config)] == [0, 0, 1, 2, 0, 0]
    states = [weights_of(Path(config.run_dir), step) for step in range(1, 7)]
    same = [same_bits(before, after) for before, after in itertools.pairwise(states)]
    assert same == [False, True, True, False, False]


def lines_of_all(config: RunConfig) -> list[dict[str, Any]]:
    return [line for line in metric_lines(config) if "lr" in line]


def checkpoints(config: RunConfig) -> list[Path]:
    return sorted((Path(config.run_dir) / "checkpoints").iterdir())


def same_bits(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """NaN equals itself here."""
    assert mine.keys() == theirs.keys()
    return all(torch.equal(bits(value), bits(theirs[name])) for name, value in mine.items())


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "frozen-stage"])
def test_layouts_agree(layout: str, folder: Path, one_rank: tuple[RunConfig, str]) -> None:
    world_size, overrides = LAYOUTS[layout]
    config = run_config(folder, layout, **OPTIONS, **start(folder), **overrides, **{LIMIT: 2})
    run_ranks(world_size, outcome, config)
    lines, expected = lines_of_all(config), lines_of_all(one_rank[0])
    for line, theirs in zip(lines, expected, strict=True):
        for name in {"step", "skipped_steps", "consumed_samples", "lr", "loss", "grad_norm"} & theirs.keys():
            assert line[name] == pytest.approx(theirs[name], rel=1e-5), name


def test_a_resumed_run_goes_on_counting(folder: Path, one_rank: tuple[RunConfig, str]) -> None:
    """Between the two steps that are skipped: the same weights and metrics; and with a limit of 1, the same end."""
    undisturbed, _ = one_rank
    for name, limit in (("resumed", 2), ("resumed-to-its-end", 1)):
        config = run_config(folder, name, **OPTIONS, **start(folder), **{LIMIT: limit})
        shutil.copytree(undisturbed.run_dir, config.run_dir)
        for step in (4, 5, 6):
            shutil.rmtree(Path(config.run_dir) / "checkpoints" / f"step_{step:08d}")
        [out] = run_ranks(1, outcome, config)
        if limit == 2:
            assert metric_lines(config) == metric_lines(undisturbed)
            assert metric_lines(config, "routing.jsonl") == metric_lines(undisturbed, "routing.jsonl")
            assert same_bits(weights_of(Path(config.run_dir), 6), weights_of(Path(undisturbed.run_dir), 6))
        else:
            assert "error: step 4: the loss is nan, after 1 such steps in a row were skipped" in out


def train_with_broken_gradient(config: RunConfig) -> list[int]:
    """The gradient of one weight is infinite in step 2, on the last rank."""

    class Broken(BeforeStep):
        def __init__(self) -> None:
            self.step = 2

        def before_step(self, trainer: Trainer) -> None:
            if trainer.state.step == 1 and dist.get_rank() == dist.get_world_size() - 1:
                [*_, weight] = trainer.state.model_chunks[0].decoder.layers[-1].self_attention.parameters()
                hook = weight.register_hook(lambda gradient: (hook.remove(), gradient.fill_(float("inf")))[1])

    train(config, Broken())
    return [line["skipped_steps"] for line in lines_of_all(config)]


@pytest.mark.parametrize("layout", ["unsharded", "dp2", "tp2", "pp2-vpp2"])
def test_a_gradient_that_is_not_finite_is_skipped(layout: str, tmp_path: Path) -> None:
    """Though the loss is finite, and though Megatron would update weights with it."""
    world_size, overrides = LAYOUTS[layout]
    config = run_config(tmp_path, **OPTIONS, **overrides, **{LIMIT: 1}, training__train_iters=3)
    assert run_ranks(world_size, train_with_broken_gradient, config)[0] == [0, 1, 1]
    assert all("loss" in line for line in lines_of(config))
    first, second = (weights_of(Path(config.run_dir), step) for step in (1, 2))
    assert same_bits(first, second)
    record = json.loads(record_of(config, 2).read_text())
    assert re.fullmatch("the gradient norm is (inf|nan)", record["reason"])
    assert all(isinstance(row["loss"], float) for row in record["rows"])


def train_with_a_damaged_rank(config: RunConfig, error_file: Path) -> str:
    """Rank 1 finds an infinite gradient norm in step 2, rank 0 a finite one, as where memory is damaged."""
    if os.environ["RANK"] == "1":
        os.environ["TORCHELASTIC_ERROR_FILE"] = str(error_file)

    class Damaged(BeforeStep):
        def __init__(self) -> None:
            self.step = 2

        def before_step(self, trainer: Trainer) -> None:
            if trainer.state.step == 1 and dist.get_rank() == 1:
                update = trainer.state.optimizer.step
                trainer.state.optimizer.step = lambda: (update()[0], math.inf, None)

    try:
        train(config, Damaged())
    except SystemExit as error:
        return f"status {error.code}"
    except RuntimeError:
        return "has lost the other rank"
    return "finished"


def test_what_one_rank_alone_has_found_is_not_lost(tmp_path: Path) -> None:
    config = run_config(tmp_path, **OPTIONS, parallel__distributed_timeout_minutes=0.5)
    ends = run_ranks(2, train_with_a_damaged_rank, config, tmp_path / "error.json")
    assert ends == ["has lost the other rank", "status 1"]
    message = json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    assert message.startswith("step 2: the gradient norm is inf; nothing of this step was saved")


def train_with_a_spike(config: RunConfig) -> str:
    class Spike(BeforeStep):
        def __init__(self) -> None:
            self.step = 10

        def before_step(self, trainer: Trainer) -> None:
            factor = {9: 1e4, 10: 1e-4}.get(trainer.state.step, 1)
            with torch.no_grad():
                trainer.state.model_chunks[0].decoder.final_layernorm.weight.mul_(factor)

    with contextlib.redirect_stdout(io.StringIO()) as out:
        train(config, Spike())
    return out.getvalue()


def test_a_spike_is_recorded_and_training_goes_on(tmp_path: Path) -> None:
    options = {"training__train_iters": 12, "training__eval_interval": 0}
    config = run_config(tmp_path, **options, training__spiky_loss_factor=1.5)
    [out] = run_ranks(1, train_with_a_spike, config)
    assert [path.name for path in record_of(config, 10).parent.iterdir()] == ["step_00000010.json"]
    record = json.loads(record_of(config, 10).read_text())
    assert record["reason"].endswith("the median of the last 9 steps")
    assert "step 10  the loss, " in out and "exceeds training.spiky_loss_factor=1.5 times" in out
    assert [row["row"] for row in record["rows"]] == [36, 37, 38, 39]
    assert "finished 12 steps" in out


@pytest.mark.parametrize(
    ("change", "overrides", "told"),
    [
        ({"rows": []}, (), "not the record of a batch that a run wrote to failed_batches/"),
        ({"rows": [{"row": -1}]}, (), "not the record of a batch that a run wrote to failed_batches/"),
        ({"step": "3"}, (), "not the record of a batch that a run wrote to failed_batches/"),
        ({"config": {"seeds": 1}}, (), "seeds: unknown key; did you mean 'seed'?"),
        ({}, ("training.train_iters=many",), "training.train_iters='many': must be an integer"),
    ],
)
def test_a_file_that_is_no_record_is_refused(
    change: dict[str, Any], overrides: tuple[str, ...], told: str, folder: Path, one_rank: tuple, tmp_path: Path
) -> None:
    values = json.loads(record_of(one_rank[0], 3).read_text())
    path = tmp_path / "record.json"
    path.write_text(json.dumps({**values, **change}))
    with pytest.raises(MostError, match=re.escape(told)):
        read_failed_batch(str(path), overrides)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed=7", "row 8 held documents"),
        ("training.global_batch_size=2", "training.global_batch_size=2: must be 4, the rows of the step"),
    ],
)
def test_other_rows_are_refused(override: str, told: str, one_rank: tuple) -> None:
    path = record_of(one_rank[0], 3)
    [printed] = run_ranks(1, replayed, path, override)
    assert f"error: {path}: " in printed and told in printed
