"""Saves a checkpoint at once, or in the background while training continues.

A save has two stages that need no communication: every rank writes its part, then rank 0 commits. All ranks synchronize
after each stage. In the background, a thread runs each stage, and the training loop learns from the sums that the ranks
exchange in a step whether all of them are ready. Threads never communicate.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from megatron_most.checkpointing import directory as directories
from megatron_most.checkpointing.directory import STATE
from megatron_most.checkpointing.metadata import METADATA, CheckpointMetadata
from megatron_most.checkpointing.rank_save import RankSave, Written
from megatron_most.checkpointing.state import plan_state
from megatron_most.errors import CheckpointError
from megatron_most.files import remove, write_json
from megatron_most.model import MoSTModel
from megatron_most.parallel import on_rank_zero, together


def save_checkpoint(
    run_dir: str | Path,
    metadata: CheckpointMetadata,
    model_chunks: list[MoSTModel],
    optimizer: MegatronOptimizer,
    keep_last: int,
    keep_every: int = 0,
) -> Path:
    """Write and commit the checkpoint of ``metadata.step``, then delete old checkpoints. Collective.

    A kill at any moment leaves the earlier checkpoints and at most a ``.tmp-`` directory.

    Args:
        keep_last, keep_every: see :func:`directories.retain`.

    Raises:
        CheckpointError: the storage cannot be written.
    """
    return CheckpointSave(run_dir, metadata, model_chunks, optimizer, keep_last, keep_every, background=False).wait()


class CheckpointSave:
    """A checkpoint that is being saved. Arguments and errors are those of :func:`save_checkpoint`.

    With ``background``, each rank copies what it writes to host memory and then writes it while the model may change;
    :meth:`advance` raises errors of the writing. Creating one is a collective call.
    """

    def __init__(
        self,
        run_dir: str | Path,
        metadata: CheckpointMetadata,
        model_chunks: list[MoSTModel],
        optimizer: MegatronOptimizer,
        keep_last: int,
        keep_every: int = 0,
        background: bool = True,
    ) -> None:
        self.directory = directories.step_directory(run_dir, metadata.step)
        self._temporary = directories.temporary_directory(self.directory)
        self._retain = lambda: directories.retain(run_dir, keep_last, keep_every)
        self._background = background
        on_rank_zero(lambda: self._prepare(metadata))
        self._rank_save: RankSave = plan_state(self._temporary / STATE, model_chunks, optimizer, copy=background)
        self._is_committing = False
        self._work = self._start(self._rank_save.write)

    @property
    def is_busy(self) -> bool:
        """Whether this rank is still working on its stage. :meth:`advance` would make the other ranks wait for it."""
        return not self._work.done()

    def advance(self) -> bool:
        """Synchronize with the other ranks and start the next stage. Returns True if none is left. Collective.

        Raises:
            CheckpointError: on the lowest rank whose work failed; the other ranks exit with status 1.
        """
        result = together(self._work.result)
        if self._is_committing:
            return True
        of_ranks: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(result, of_ranks)
        self._is_committing = True
        self._work = self._start(lambda: None if of_ranks is None else self._commit(of_ranks))
        return False

    def wait(self) -> Path:
        """Finish the save. Returns the checkpoint's directory. Collective. Errors are those of :meth:`advance`."""
        while not self.advance():
            pass
        return self.directory

    def abandon(self) -> None:
        """Stop writing because the run is ending. What is written so far does not become a checkpoint."""
        self._rank_save.abandon()

    def _prepare(self, metadata: CheckpointMetadata) -> None:
        try:
            remove(self._temporary)
            (self._temporary / STATE).mkdir(parents=True)
            write_json(self._temporary / METADATA, metadata.to_dict(), CheckpointError)
        except OSError as error:
            raise CheckpointError(f"{self._temporary}: cannot be written: {error.strerror}") from error

    def _commit(self, of_ranks: list[Written]) -> None:
        entries = {f"{STATE}/{name}": entry for written in of_ranks for name, entry in written.entries.items()}
        try:
            self._rank_save.write_index([written.results for written in of_ranks])
            others = [name for name in directories.list_files(self._temporary) if name not in entries]
            directories.write_manifest(self._temporary, {**entries, **directories.checksum(self._temporary, others)})
            directories.commit(self._temporary, self.directory)
            self._retain()
        except OSError as error:
            raise CheckpointError(f"{self.directory}: cannot be committed: {error.strerror}") from error

    def _start(self, work: Callable[[], Any]) -> Future[Any]:
        """Do ``work`` now, or in a thread."""
        done: Future[Any] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        if self._background:
            threading.Thread(target=run, name=f"save {self.directory.name}").start()
        else:
            run()
        return done
