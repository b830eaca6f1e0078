"""The batches of a run: the same stream of samples at any data-parallel size, from any number of consumed samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_most.audio import codec_file, file_fingerprint
from megatron_most.config import DatasetConfig, RunConfig
from megatron_most.data.loading.batch import Batch, make_batch
from megatron_most.data.loading.blend import Row, Rows, weights_for_audio_share
from megatron_most.data.storage.documents import TASKS
from megatron_most.data.storage.token_dataset import TokenDataset
from megatron_most.errors import ConfigError, DataError
from megatron_most.text import load_tokenizer


def train_batches(
    config: RunConfig, *, dp_rank: int, dp_size: int, consumed_samples: int, rows: Rows | None = None
) -> Iterator[Batch]:
    """Endless micro-batches of one data-parallel rank, ``config.num_microbatches(dp_size)`` per step.

    A sample is a row. Each step takes the next ``global_batch_size`` rows after those consumed. Of these, micro-batch m
    on rank r takes ``micro_batch_size`` rows from ``(m * dp_size + r) * micro_batch_size`` on. So the rows of a step
    depend neither on ``dp_size`` nor on where a run was interrupted.

    Args:
        rows: those of :func:`train_rows`, which opens them otherwise.

    Raises:
        ConfigError: no training data is configured, or the batch size cannot be divided over ``dp_size`` ranks.
        DataError: a dataset is damaged, or does not fit the model or another dataset.
    """
    sequence = train_rows(config) if rows is None else rows
    num_microbatches, size = config.num_microbatches(dp_size), config.training.micro_batch_size

    def stream() -> Iterator[Batch]:
        step_start = consumed_samples
        while True:
            for microbatch in range(num_microbatches):
                first = step_start + (microbatch * dp_size + dp_rank) * size
                taken = [sequence[k] for k in range(first, first + size)]
                yield make_batch(taken, config.vocab, config.data)
            step_start += config.training.global_batch_size

    return stream()


def train_rows(config: RunConfig) -> Rows:
    """The training rows of a run. Raises the errors of :func:`train_batches`."""
    data = config.data
    if not data.train:
        raise ConfigError("data.train=[]: must name at least one dataset")
    datasets = open_datasets(config, data.train)
    weights = np.array([entry.weight for entry in data.train])
    if data.audio_share is not None:
        weights = weights_for_audio_share(weights, [dataset.audio_share for dataset in datasets], data.audio_share)
    return Rows(datasets, weights, data, config.seed)


def validation_batches(config: RunConfig, *, dp_rank: int, dp_size: int) -> dict[str, list[Batch]]:
    """File name of each validation dataset -> the micro-batches of one data-parallel rank.

    Together the ranks hold the first ``eval_iters * global_batch_size`` rows of the dataset in a fixed random order, or
    all rows if there are fewer: the same at any ``dp_size`` and seed. Every rank has the same number of micro-batches;
    rows of padding fill the last ones.

    Raises:
        ConfigError: two datasets have the same file name.
        DataError: a dataset is damaged, or does not fit the model or another dataset.
    """
    data, training = config.data, config.training
    names = [Path(entry.path).name for entry in data.validation]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"data.validation: {names.count(name)} datasets are named {name!r}; names must differ")
    batches: dict[str, list[Batch]] = {}
    for name, dataset in zip(names, open_datasets(config, data.validation), strict=True):
        rows = Rows([dataset], [1.0], dataclasses.replace(data, audio_frame_dropout=0.0), seed=0)
        num_rows = min(training.eval_iters * training.global_batch_size, rows.rows_per_epoch[0])
        batches[name] = shared_batches(
            rows.__getitem__, num_rows, dataset.task, config, dp_rank=dp_rank, dp_size=dp_size
        )
    return batches


def shared_batches(
    read: Callable[[int], Row], num_rows: int, task: str, config: RunConfig, *, dp_rank: int, dp_size: int
) -> list[Batch]:
    """The micro-batches of one data-parallel rank of the rows ``read(0)`` to ``read(num_rows - 1)``, of one task.

    Every rank has the same number of them; rows of padding fill the last ones.
    """
    size, padding = config.training.micro_batch_size, Row(TASKS.index(task))
    batches = []
    for start in range(0, num_rows, size * dp_size):
        first = start + dp_rank * size
        taken = [read(k) if k < num_rows else padding for k in range(first, first + size)]
        batches.append(make_batch(taken, config.vocab, config.data))
    return batches


def open_datasets(config: RunConfig, entries: Sequence[DatasetConfig]) -> list[TokenDataset]:
    """Open datasets and check that their vocabulary, tokenizer and codec are the configured ones.

    Raises:
        DataError: a dataset differs from the configuration or from another dataset; names both and what differs.
    """
    datasets = [TokenDataset(entry.path) for entry in entries]
    for dataset in datasets:
        difference = dataset.vocab.describe_difference(config.vocab)
        if difference:
            raise DataError(f"dataset {dataset.prefix}: its vocabulary differs from the configuration's: {difference}")
    if config.tokenizer is not None:
        fingerprint = load_tokenizer(config.tokenizer).fingerprint
        for dataset in datasets:
            _require_same("tokenizer", dataset, config.tokenizer, fingerprint)
    if config.codec is not None:
        # The training machine may not have a pretrained codec's weights; then only its name can be compared.
        file = codec_file(config.codec)
        codec_fingerprint = file_fingerprint(file) if file else None
        for dataset in datasets:
            _require_same("codec", dataset, config.codec, codec_fingerprint)
    _require_same_sources(datasets)
    return datasets


def _require_same(what: str, dataset: TokenDataset, configured: str, fingerprint: str | None) -> None:
    made_with = dataset.provenance.get(what)
    if made_with is None:  # text needs no codec
        return
    found, wanted = made_with["name"], configured
    is_same = found == wanted
    if fingerprint is not None:
        is_same = made_with["fingerprint"] == fingerprint
        found, wanted = f"{found} ({made_with['fingerprint'][:12]})", f"{wanted} ({fingerprint[:12]})"
    if not is_same:
        raise DataError(f"dataset {dataset.prefix}: was built with {what} {found}, the configuration has {wanted}")


def _require_same_sources(datasets: Sequence[TokenDataset]) -> None:
    """Raise :class:`DataError` unless all datasets have the same tokenizer, codec and template version."""
    seen: dict[str, tuple[str, str]] = {}
    for dataset in datasets:
        values = {"template version": dataset.provenance.get("template_version")}
        for what in ("tokenizer", "codec"):
            values[what] = (dataset.provenance.get(what) or {}).get("fingerprint")
        for what, value in values.items():
            if value is None:
                continue
            other, expected = seen.setdefault(what, (dataset.prefix, value))
            if value != expected:
                raise DataError(
                    f"datasets {other} and {dataset.prefix} were built with different {what}s"
                    f" ({expected[:12]} and {value[:12]})"
                )
