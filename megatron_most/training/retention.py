"""How well the model still predicts text while it learns speech: bits per byte of one text, measured in training.

    bits per byte = cross entropy / ln 2 / UTF-8 bytes      with a softmax over the whole vocabulary, audio ids included

``most evaluate --suite text`` reports the same number of a checkpoint as ``whole.bits_per_byte``. What it was at the
start stands in :data:`RETENTION`, so that a resumed run compares with the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_most import platform
from megatron_most.config import DataConfig, RunConfig
from megatron_most.data.building.text_windows import read_texts, windows
from megatron_most.data.loading.batch import Batch
from megatron_most.data.loading.blend import Row
from megatron_most.data.loading.loader import shared_batches
from megatron_most.data.loading.packing import pack, padded_length
from megatron_most.data.storage.documents import TASKS, Document
from megatron_most.errors import ConfigError, DataError, MostError
from megatron_most.files import read_json, write_json
from megatron_most.parallel import fail, is_rank_zero, on_rank_zero
from megatron_most.text import load_tokenizer
from megatron_most.training.metrics import BITS_PER_BYTE, PERPLEXITY
from megatron_most.training.microbatches import stage
from megatron_most.training.step_hooks import MetricsLog, StepHook
from megatron_most.training.train_step import StepResult
from megatron_most.training.validation import validate

if TYPE_CHECKING:
    from megatron_most.training.trainer import Trainer

RETENTION = "retention.json"
TASK = "text_lm"


@dataclass(frozen=True)
class RetentionText:
    """The text to predict.

    batches: this data-parallel rank's, on the host.
    num_tokens, num_bytes: of the whole text.
    fingerprint: of its ids and its length.
    """

    batches: list[Batch]
    num_tokens: int
    num_bytes: int
    fingerprint: str


def read_retention_text(config: RunConfig, *, dp_rank: int, dp_size: int) -> RetentionText:
    """Read ``training.retention.data``, cut into windows of ``data.seq_length``.

    Raises:
        DataError: the file cannot be read, or a text has no ids or some that the model does not have.
        ConfigError: no such tokenizer.
    """
    path, vocab = config.training.retention.data, config.vocab
    assert path is not None and config.tokenizer is not None, "checked by the configuration"
    tokenizer = load_tokenizer(config.tokenizer)
    documents: list[Document] = []
    digest, num_tokens, num_bytes = hashlib.sha256(), 0, 0
    for name, text in read_texts(path).items():
        ids = tokenizer.encode(text)
        if not ids:
            raise DataError(f"training.retention.data={path}: {name}: text is empty")
        if max(ids) >= vocab.text_vocab_size:
            raise DataError(
                f"training.retention.data={path}: {name}: text id {max(ids)} is outside the layout's"
                f" {vocab.text_vocab_size} text ids"
            )
        documents += windows(vocab, ids, tokenizer.bos_id, config.data.seq_length)
        digest.update(np.array([len(ids), *ids], dtype=np.int64).tobytes())
        num_tokens += len(ids)
        num_bytes += len(text.encode())
    rows = _rows(documents, config.data)
    batches = shared_batches(rows.__getitem__, len(rows), TASK, config, dp_rank=dp_rank, dp_size=dp_size)
    return RetentionText(batches, num_tokens, num_bytes, digest.hexdigest())


def _rows(documents: Sequence[Document], data: DataConfig) -> list[Row]:
    """Rows of at most ``data.seq_length`` positions, packed as training's are."""
    if not data.packing:
        return [_row([document]) for document in documents]
    inputs = np.array([len(document) - 1 for document in documents])  # the last id is only a label
    row_of, order = pack(padded_length(inputs, data.document_multiple), data.seq_length)
    members: list[list[Document]] = [[] for _ in range(int(row_of.max()) + 1)]
    for index in order.tolist():
        members[row_of[index]].append(documents[index])
    return [_row(of_row) for of_row in members]


def _row(documents: Sequence[Document]) -> Row:
    joined = Document(
        np.concatenate([document.ids for document in documents]),
        np.concatenate([document.loss_mask for document in documents]),
        documents[0].coded,  # text has no codes
        documents[0].codes,
    )
    return Row(TASKS.index(TASK), joined, np.array([len(document) for document in documents], dtype=np.int64))


class Retention(StepHook):
    """Measures the text before the first step, every ``training.retention.interval`` steps and after the last one.

    Warns when its bits per byte exceed those of the start by more than ``training.retention.limit``. Construction is
    collective.
    """

    is_long = True

    def __init__(self, log: MetricsLog, trainer: Trainer, text: RetentionText) -> None:
        self._log, self._text, self._path = log, text, Path(trainer.run_dir) / RETENTION
        resumes = trainer.state.step > 0
        self._start: tuple[int, float] | None = on_rank_zero(self._known_start) if resumes else None

    def _known_start(self) -> tuple[int, float] | None:
        """Step and bits per byte of the start, if an earlier process of this run measured the same text."""
        if not self._path.is_file():
            return None
        try:
            found = read_json(self._path)
        except ConfigError as error:
            print(f"warning: {error}; text retention starts anew", flush=True)
            return None
        step, value = found.get("step"), found.get("bits_per_byte")
        if not isinstance(step, int) or not isinstance(value, float) or found.get("text") != self._text.fingerprint:
            print(f"warning: {self._path}: is of another text; text retention starts anew", flush=True)
            return None
        return step, value

    def before_step(self, trainer: Trainer) -> None:
        if self._start is None:
            step = trainer.state.step
            self._start = (step, self._measure(trainer))
            start = {"step": step, "bits_per_byte": self._start[1], "text": self._text.fingerprint}
            on_rank_zero(lambda: write_json(self._path, start))
            self._report(trainer, self._start[1])

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        step, training = trainer.state.step, trainer.config.training
        if step % training.retention.interval == 0 or step == training.train_iters:
            self._report(trainer, self._measure(trainer))

    def _measure(self, trainer: Trainer) -> float:
        """Bits per byte, the same on every rank. Collective."""
        trainer.enter("measuring text retention", self.is_long)
        device, state = platform.device(), trainer.state
        batches = [stage(batch, device) for batch in self._text.batches]
        losses = validate(state.wrapped, {TASK: batches}, state.loss_table)
        value = losses[f"validation/{TASK}/loss"] * self._text.num_tokens / math.log(2) / self._text.num_bytes
        if not math.isfinite(value):
            error = MostError(
                f"step {state.step}: text retention: {value} bits per byte; nothing of this step was saved"
            )
            fail(error if is_rank_zero() else None)
        return value

    def _report(self, trainer: Trainer, value: float) -> None:
        """Log a measurement, on rank 0."""
        assert self._start is not None
        (start_step, start), limit = self._start, trainer.config.training.retention.limit
        if self._log.writer is None:
            return
        nats = value * math.log(2) * self._text.num_bytes / self._text.num_tokens
        change = f"{value / start - 1:+.2%} since step {start_step}"
        self._log.writer.retention(trainer.state.step, {BITS_PER_BYTE: value, PERPLEXITY: math.exp(nats)}, change)
        if value > start * (1 + limit):
            trainer.say(
                f"warning: step {trainer.state.step}: text retention: {value:.4f} bits per byte are {change};"
                f" training.retention.limit={limit:g} allows {limit:+.2%}"
            )
