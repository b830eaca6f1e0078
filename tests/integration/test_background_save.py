"""Checkpoints that are saved while training goes on: equal content, order, errors, kills."""

from __future__ import annotations

import errno
import math
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from megatron_most import parallel
from megatron_most.checkpointing import CheckpointSave, complete_checkpoints, read_metadata, saving
from megatron_most.checkpointing import directory as directories
from megatron_most.checkpointing.rank_save import RankSave, _Planner
from megatron_most.checkpointing.regions import StateReader
from megatron_most.checkpointing.state import plan_state
from megatron_most.config import RunConfig
from megatron_most.errors import MostError
from megatron_most.parallel import on_rank_zero
from megatron_most.training import Trainer, build_train_state, train_step
from tests.distributed.harness import run_ranks
from tests.distributed.observe import mixed_batches, own_share
from tests.distributed.tiny import tiny_config
from tests.integration.tiny_run import BeforeStep, assert_same_weights, metric_lines, run_config, train

PATIENCE = 60
"""Seconds after which a test that waits for another thread has failed."""

Undisturbed = tuple[Path, RunConfig, list[dict[str, torch.Tensor]]]


def ep2_config(directory: Path, name: str, **overrides: Any) -> RunConfig:
    return run_config(directory, name, parallel__expert_model_parallel_size=2, **overrides)


def saved_steps(config: RunConfig) -> list[int]:
    return [read_metadata(path).step for path in complete_checkpoints(config.run_dir)[0]]


def leftovers(config: RunConfig) -> list[Path]:
    return list((Path(config.run_dir) / "checkpoints").glob(".tmp-*"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Where a run that saves at once went to its end on two ranks, its configuration, and each rank's weights."""
    directory = tmp_path_factory.mktemp("undisturbed")
    config = ep2_config(directory, "undisturbed", checkpoint__async_save=False)
    return directory, config, run_ranks(2, train, config)


def hold_writing_of_step(step: int, until: threading.Event) -> None:
    """From now on this rank writes the checkpoint of ``step`` not before the event."""
    write = RankSave.write

    def held(share: RankSave) -> Any:
        if share._directory.parent.name.endswith(f"{step:08d}") and not until.wait(PATIENCE):
            raise RuntimeError("nobody went on while the checkpoint was being written")
        return write(share)

    RankSave.write = held


def train_with_slow_storage(config: RunConfig) -> dict[str, torch.Tensor]:
    """The checkpoint of step 3 is written when step 6 begins."""
    reached = threading.Event()
    hold_writing_of_step(3, until=reached)

    def look_and_go_on() -> None:
        assert not (Path(config.run_dir) / "checkpoints" / "step_00000003").exists()
        reached.set()

    return train(config, BeforeStep(6, look_and_go_on))


def tensor_files(config: RunConfig, step: int) -> dict[str, directories.FileEntry]:
    entries = directories.read_manifest(directories.step_directory(config.run_dir, step))
    return {name: entry for name, entry in entries.items() if name.endswith(".distcp")}


def test_training_goes_on_while_storage_is_slow_and_the_files_are_those_of_a_save_at_once(
    undisturbed: Undisturbed,
) -> None:
    directory, at_once, weights = undisturbed
    slow = ep2_config(directory, "slow")
    assert_same_weights(weights, run_ranks(2, train_with_slow_storage, slow))
    assert metric_lines(slow) == metric_lines(at_once)
    assert saved_steps(slow) == [3, 6]
    for step in (3, 6):
        assert len(tensor_files(slow, step)) == 2
        assert tensor_files(slow, step) == tensor_files(at_once, step)


def train_until_somebody_waits(config: RunConfig, stop_at: int) -> None:
    """The first checkpoint is not written before the run waits for it; the run is asked to stop in ``stop_at``."""
    waiting = threading.Event()
    hold_writing_of_step(config.checkpoint.save_interval, until=waiting)
    wait = CheckpointSave.wait

    def wait_after_word(save: CheckpointSave) -> Path:
        waiting.set()
        return wait(save)

    CheckpointSave.wait = wait_after_word
    train(config, BeforeStep(stop_at, lambda: os.kill(os.getpid(), signal.SIGTERM)))


@pytest.mark.parametrize(("interval", "stop_at", "saved"), [(3, 4, [3, 4]), (1, 3, [1, 2, 3])], ids=["stop", "next"])
def test_a_request_to_stop_and_the_next_save_wait_for_the_one_under_way(
    interval: int, stop_at: int, saved: list[int], tmp_path: Path
) -> None:
    config = run_config(tmp_path, checkpoint__save_interval=interval, checkpoint__keep_last=9)
    run_ranks(1, train_until_somebody_waits, config, stop_at)
    assert saved_steps(config) == saved
    assert not leftovers(config)


def train_on_a_disk_that_fills(config: RunConfig, step: int) -> None:
    """Rank 1 cannot write the checkpoint of ``step``."""
    write_data = FileSystemWriter.write_data

    def refuse(writer: FileSystemWriter, *rest: Any) -> Any:
        if writer.path.parent.name.endswith(f"{step:08d}") and os.environ["RANK"] == "1":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_data(writer, *rest)

    FileSystemWriter.write_data = refuse
    train(config)


def test_a_failed_write_ends_the_run_in_a_line_and_the_earlier_checkpoint_stays(tmp_path: Path) -> None:
    config = ep2_config(tmp_path, "full", checkpoint__save_interval=2, checkpoint__keep_last=1)
    told = r"state: cannot be written: No space left on device \(rank 1\)\n$"
    with pytest.raises(RuntimeError, match=rf"CheckpointError: \S+\.tmp-step_00000004/{told}"):
        run_ranks(2, train_on_a_disk_that_fills, config, 4)
    assert saved_steps(config) == [2]


def train_and_die(config: RunConfig, moment: str) -> None:
    """``kill -9`` this rank while it saves step 3."""

    def die(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    hooks = []
    if moment == "writing":
        items: list[object] = []
        is_half_written = threading.Event()
        resolve = _Planner.resolve_data

        def count(planner: _Planner, item: Any) -> Any:
            # Half of its tensors are in the file then, and training goes on until it dies.
            items.append(item)
            if len(items) == 60:
                is_half_written.set()
                threading.Event().wait(PATIENCE)
            return resolve(planner, item)

        hold = _Planner.hold_copies

        def hold_then_count(planner: _Planner, plan: Any) -> None:
            hold(planner, plan)
            _Planner.resolve_data = count

        _Planner.hold_copies = hold_then_count
        hooks.append(BeforeStep(5, lambda: is_half_written.wait(PATIENCE) and die()))
    elif moment == "written":
        CheckpointSave.advance = die
    else:
        setattr(saving.directories, moment, die)
    train(config, *hooks)


@pytest.mark.parametrize(
    ("moment", "saved"),
    [
        ("writing", []),
        pytest.param("written", [], marks=pytest.mark.slow),
        ("commit", []),
        pytest.param("retain", [3], marks=pytest.mark.slow),
    ],
)
def test_kill_9_while_saving_leaves_nothing_half_and_the_rerun_equals_an_undisturbed_run(
    moment: str, saved: list[int], undisturbed: Undisturbed
) -> None:
    directory, at_once, weights = undisturbed
    killed = ep2_config(directory, f"killed-{moment}")
    with pytest.raises(RuntimeError, match="died without a word"):
        run_ranks(2, train_and_die, killed, moment)
    assert saved_steps(killed) == saved
    if moment == "writing":
        [temporary] = leftovers(killed)
        assert all(file.stat().st_size for file in (temporary / "state").glob("*.distcp"))
    assert_same_weights(weights, run_ranks(2, train, killed))
    assert metric_lines(killed) == metric_lines(at_once)
    assert not leftovers(killed)


def train_and_fail(config: RunConfig) -> bool:
    """Another error ends the run while a checkpoint is written, which would take :data:`PATIENCE`."""
    resolve = _Planner.resolve_data
    writers: list[threading.Thread] = []

    def slow(planner: _Planner, item: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            writers.append(threading.current_thread())
            planner.abandoned.wait(PATIENCE)
        return resolve(planner, item)

    def fail() -> None:
        raise MostError("something else")

    _Planner.resolve_data = slow
    trainer = Trainer(config, [BeforeStep(5, fail)])
    with pytest.raises(MostError, match="something else"):
        trainer.run()
    [writer] = writers
    writer.join(PATIENCE / 2)
    return writer.is_alive()


def test_an_error_of_another_kind_does_not_wait_for_the_storage(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    assert run_ranks(1, train_and_fail, config) == [False]
    assert saved_steps(config) == []


def copies_of_a_share(state: Path) -> int:
    """Bytes of host memory that this rank holds from planning a checkpoint to writing it."""
    config = tiny_config(precision__dtype="bf16")
    parallel.initialize(config.parallel, seed=1)
    training = build_train_state(config)
    train_step(training, own_share(mixed_batches(config, 0)))
    on_rank_zero(state.mkdir)
    share = plan_state(state, training.model_chunks, training.optimizer, copy=True)
    copies = [copy for copy in share._planner._copies.values() if isinstance(copy, torch.Tensor)]
    assert all(copy.untyped_storage().nbytes() == copy.nbytes for copy in copies)
    written = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(written, share.write().results)
    on_rank_zero(lambda: share.write_index(written))
    assert not share._planner._copies and not share._planner.state_dict
    return sum(copy.nbytes for copy in copies)


def test_ranks_hold_each_byte_of_a_checkpoint_once_and_let_it_go(tmp_path: Path) -> None:
    first, second = run_ranks(2, copies_of_a_share, tmp_path / "state")
    forms = StateReader(tmp_path / "state").forms.values()
    assert first + second == sum(math.prod(form.shape) * form.dtype.itemsize for form in forms)
    assert min(first, second) > 0.45 * (first + second)
