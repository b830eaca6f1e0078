"""examples/pretrain_most.py as a user meets it: what it prints, how it leaves, what it leaves behind."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import runpy
import shutil
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.checkpoint import FileSystemWriter

from megatron_most.cli import STOPPED
from megatron_most.commands.train import STOPPED_FILE
from megatron_most.config import RunConfig, dump_config
from megatron_most.training import Trainer, prefetch
from megatron_most.training.stop import StopRequest
from tests.distributed.harness import run_ranks
from tests.integration.tiny_run import metric_lines, run_config, write_dataset

SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain_most.py"


def command(*arguments: str) -> tuple[object, str, str]:
    """Exit status, standard output and standard error of the script on this rank."""
    sys.argv = [str(SCRIPT), *arguments]
    status: object = 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as leaving:
            status = leaving.code
    return status, out.getvalue(), err.getvalue()


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return run_config(tmp_path)


@pytest.fixture
def config_file(config: RunConfig, tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    return str(path)


def one_error_line(results: list[tuple[object, str, str]]) -> str:
    """The one line that all ranks together print; all of them must have failed."""
    assert all(status == 1 for status, _, _ in results)
    lines = [line for _, _, err in results for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


def test_training_prints_progress_and_leaves_a_run(config: RunConfig, config_file: str) -> None:
    [(status, out, _)] = run_ranks(1, command, "--config", config_file, "training.train_iters=4")
    assert status == 0
    assert "step 4/4  loss" in out
    assert "finished 4 steps" in out
    assert [line["step"] for line in metric_lines(config) if "loss" in line] == [1, 2, 4]
    run_dir = Path(config.run_dir)
    assert {"config.yaml", "environment.json", "metrics.jsonl", "routing.jsonl", "checkpoints"} <= {
        path.name for path in run_dir.iterdir()
    }
    routing = metric_lines(config, "routing.jsonl")
    assert [line["step"] for line in routing] == [1, 2, 4]
    assert all(layer["outside_group"] == 0 for line in routing for layer in line["layers"])


@pytest.mark.parametrize("under_torchrun", [False, True])
def test_training_that_is_asked_to_stop_saves_and_says_so(
    under_torchrun: bool, config: RunConfig, config_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StopRequest, "__bool__", lambda stop: True)
    record = tmp_path / "stopped"
    if under_torchrun:  # which takes any other status for a failure, and would start the ranks again
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv(STOPPED_FILE, str(record))
    [(status, out, _)] = run_ranks(1, command, "--config", config_file)
    assert status == (0 if under_torchrun else STOPPED)
    assert "after step 1, saved; run again to continue" in out
    assert record.exists() == under_torchrun
    monkeypatch.undo()
    monkeypatch.setenv(STOPPED_FILE, str(record))
    assert run_ranks(1, command, "--config", config_file)[0][0] == 0
    assert not record.exists()


def test_a_loader_that_hangs_ends_the_run_in_one_line(
    config: RunConfig, config_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_stage", lambda trainer, batch: time.sleep(60))
    monkeypatch.setattr(prefetch, "_JOIN_SECONDS", 0.1)
    options = ("training.eval_interval=0", "parallel.distributed_timeout_minutes=0.04")
    [(status, out, err)] = run_ranks(1, command, "--config", config_file, *options)
    assert status == 1
    assert err.splitlines()[-1] == (
        "error: rank 0, step 1, waiting for data: no batch within parallel.distributed_timeout_minutes=0.04; stacks of"
        f" the loader: {config.run_dir}/stacks"
    )
    assert "rank 0: step 1, waiting for data at training/prefetch.py" in out
    assert "in _work" in (Path(config.run_dir) / "stacks" / "rank-0.txt").read_text()


def test_dry_run_writes_nothing(config: RunConfig, config_file: str) -> None:
    [(status, out, _)] = run_ranks(1, command, "--config", config_file, "--dry-run", "--world-size", "2")
    assert status == 0
    assert "ranks: 2" in out
    assert not Path(config.run_dir).exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.expert_model_parallel_size=4"], "= 4 ranks, but only 2 were started"),
        (["training.global_batch_size=3"], "training.global_batch_size=3: must be divisible by"),
        (
            [
                "training.global_batch_size=3",
                "parallel.pipeline_model_parallel_size=2",
                "parallel.virtual_pipeline_model_parallel_size=2",
            ],
            "gives 3 micro-batches on each rank; virtual pipeline stages need a multiple of 2",
        ),
        (["model.hidden_sise=3"], "did you mean 'hidden_size'"),
        (["data.train=[{path: /nowhere/asr}]"], "dataset /nowhere/asr: /nowhere/asr.json is missing"),
        (["checkpoint.load=/nowhere"], "/nowhere: no such checkpoint directory"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    overrides: list[str], message: str, config: RunConfig, config_file: str
) -> None:
    assert message in one_error_line(run_ranks(2, command, "--config", config_file, *overrides))
    assert not Path(config.run_dir).exists()


def test_a_missing_tracker_leaves_nothing(config: RunConfig, config_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    results = run_ranks(2, command, "--config", config_file, "logging.wandb_project=most")
    assert "wandb is not installed" in one_error_line(results)
    assert not Path(config.run_dir).exists()


def test_run_directory_and_checkpoints_of_another_model_are_refused(config: RunConfig, config_file: str) -> None:
    run_ranks(1, command, "--config", config_file, "training.train_iters=3")
    before = sorted(Path(config.run_dir).rglob("*"))

    other = [(*run_ranks(1, command, "--config", config_file, "model.hidden_size=48")[0],)]
    assert "belongs to another run: model.hidden_size is 32 there, 48 in this config" in one_error_line(other)

    load = ["model.hidden_size=48", f"run_dir={config.run_dir}-2", f"checkpoint.load={config.run_dir}"]
    other = run_ranks(2, command, "--config", config_file, *load)
    assert "belongs to another model: model.hidden_size is 32 in the checkpoint, 48" in one_error_line(other)
    assert sorted(Path(config.run_dir).rglob("*")) == before


def test_a_corrupt_checkpoint_is_refused_and_a_torn_one_is_skipped(config: RunConfig, config_file: str) -> None:
    run_ranks(1, command, "--config", config_file)
    checkpoints = Path(config.run_dir) / "checkpoints"
    shard = next((checkpoints / "step_00000006" / "state").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    more = ("--config", config_file, "training.train_iters=8")
    line = one_error_line(run_ranks(2, command, *more))
    assert f"corrupt: the content of state/{shard.name} does not match its checksum" in line

    shard.write_bytes(content[:-1])
    [(status, out, _)] = run_ranks(1, command, *more)
    assert status == 0
    assert "warning: skipped checkpoint" in out
    assert "resuming from" in out
    assert "step_00000003" in out


def test_a_dataset_built_anew_is_refused_where_there_is_a_checkpoint(config: RunConfig, config_file: str) -> None:
    asr = config.data.train[0].path
    run_ranks(1, command, "--config", config_file, "training.train_iters=3")
    write_dataset(Path(asr), config, "asr", seed=1, num_documents=25)
    line = one_error_line(run_ranks(2, command, "--config", config_file))
    assert f"step_00000003: dataset {asr} was rebuilt with other content" in line

    shutil.rmtree(Path(config.run_dir) / "checkpoints")
    [(status, out, _)] = run_ranks(1, command, "--config", config_file, "training.train_iters=3")
    assert status == 0
    assert "finished 3 steps" in out


def test_broken_checkpoint_metadata_is_told_once(config: RunConfig, config_file: str) -> None:
    run_ranks(1, command, "--config", config_file, "training.train_iters=3")
    path = Path(config.run_dir) / "checkpoints" / "step_00000003" / "checkpoint.json"
    path.write_bytes(b"{" * path.stat().st_size)  # of its old size, so that the checkpoint counts as complete
    line = one_error_line(run_ranks(2, command, "--config", config_file))
    assert f"{path.parent}: corrupt: the content of checkpoint.json does not match its checksum" in line


@pytest.mark.parametrize("dimension", ["tensor", "pipeline"])
def test_broken_data_found_in_a_step_is_told_by_one_of_the_ranks_that_read_it(
    dimension: str, config: RunConfig, config_file: str
) -> None:
    ids = Path(f"{config.data.train[1].path}.ids.bin")
    ids.write_bytes(b"\x7f" * ids.stat().st_size)
    line = one_error_line(run_ranks(2, command, "--config", config_file, f"parallel.{dimension}_model_parallel_size=2"))
    assert f"dataset {config.data.train[1].path}, document" in line
    assert "is outside the layout" in line


def command_on_a_full_disk(full_on_rank: str, *arguments: str) -> tuple[object, str, str]:
    def no_space(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if os.environ["RANK"] == full_on_rank:
        FileSystemWriter.write_data = no_space
    return command(*arguments)


@pytest.mark.parametrize("full_on_rank", ["0", "1"])
def test_a_full_disk_is_told_once(full_on_rank: str, config: RunConfig, config_file: str) -> None:
    results = run_ranks(2, command_on_a_full_disk, full_on_rank, "--config", config_file)
    line = one_error_line(results)
    assert f"state: cannot be written: No space left on device (rank {full_on_rank})" in line
    assert not list((Path(config.run_dir) / "checkpoints").glob("step_*"))


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(config: RunConfig, config_file: str) -> None:
    results = run_ranks(2, command, "--config", config_file, "optimizer.lr=1e30", "optimizer.clip_grad=0")
    assert "the loss is nan" in (line := one_error_line(results)) or "gradient norm is" in line
    assert not list((Path(config.run_dir) / "checkpoints").glob("step_*"))
