"""Statistics of datasets, and single documents as text and audio, for ``most prepare inspect``."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from megatron_most.data.storage.documents import Document
from megatron_most.data.storage.token_dataset import TokenDataset
from megatron_most.errors import DataError
from megatron_most.text import TextTokenizer
from megatron_most.vocab import Modality, VocabLayout

BAR = 50
"""Length of a histogram's longest bar, in characters."""


def summary(dataset: TokenDataset) -> str:
    """One line: task, layout and counts."""
    counts = dataset.provenance["counts"]
    return (
        f"{dataset.prefix}: task {dataset.task}, layout {dataset.vocab.layout}, {counts['documents']} documents,"
        f" {counts['positions']} positions ({counts['target_positions']} with loss),"
        f" {counts['audio_frames']} audio frames"
    )


def audio_seconds(dataset: TokenDataset) -> float | None:
    """Duration of all audio, in whole codec frames; None if the dataset was built without a codec."""
    codec = dataset.provenance["codec"]
    return dataset.provenance["counts"]["audio_frames"] / codec["frame_rate"] if codec else None


def statistics(dataset: TokenDataset) -> list[str]:
    """A line each for audio, input positions by modality, duplicates and lengths, then a histogram of the lengths."""
    lines = []
    if (seconds := audio_seconds(dataset)) is not None:
        codec = dataset.provenance["codec"]
        lines.append(
            f"audio: {seconds / 3600:.2f} h at {codec['sample_rate']} Hz, {codec['frame_rate']:g} frames/s, first"
            f" {dataset.vocab.num_codebooks} of {codec['num_codebooks']} codebooks, codec {codec['name']}"
        )
    total = sum(dataset.input_positions.values())
    shares = (f"{name} {count} ({count / total:.1%})" for name, count in dataset.input_positions.items())
    lines.append(f"input positions: {total}: {', '.join(shares)}")
    lines.append(f"duplicates: {num_duplicates(dataset)} documents are equal to an earlier one")
    quantiles = np.percentile(dataset.lengths, (0, 50, 95, 100)).astype(int)
    lines.append("positions per document: minimum {}, median {}, 95th percentile {}, maximum {}".format(*quantiles))
    return lines + histogram(dataset.lengths)


def totals(datasets: Iterable[TokenDataset]) -> list[str]:
    """A table: documents, hours and input positions by modality, summed over datasets, for each task and in all."""
    rows: dict[str, defaultdict[str, float]] = {}
    for dataset in datasets:
        for name in (dataset.task, "all"):
            row = rows.setdefault(name, defaultdict(float))
            row["documents"] += len(dataset)
            row["hours"] += (audio_seconds(dataset) or 0) / 3600
            for modality, count in dataset.input_positions.items():
                row[modality] += count
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    table = [["task", *columns]]
    for name in [*(task for task in rows if task != "all"), "all"]:
        cells = [format(rows[name][column], ".2f" if column == "hours" else ".0f") for column in columns]
        table.append([name, *cells])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]


def histogram(lengths: np.ndarray, num_bins: int = 16) -> list[str]:
    """A line with a bar and a count for each bin of lengths."""
    edges = np.unique(np.linspace(lengths.min(), lengths.max() + 1, num_bins + 1).astype(int))
    counts, _ = np.histogram(lengths, bins=edges)
    width = len(str(edges[-1]))
    lines = []
    for start, end, count in zip(edges[:-1], edges[1:], counts, strict=True):
        bar = "#" * -(-int(count) * BAR // int(counts.max()))
        lines.append(f"{start:>{width}}..{end - 1:<{width}} {bar} {count}")
    return lines


def num_duplicates(dataset: TokenDataset) -> int:
    """How many documents have the ids and codes of an earlier one."""
    digests = {dataset.digest(index) for index in range(len(dataset))}
    return len(dataset) - len(digests)


def describe(document: Document, vocab: VocabLayout, tokenizer: TextTokenizer) -> str:
    """One line: text, ``<n frames>`` for audio, ``<n name>`` for n ids of another modality; targets in brackets."""
    parts = []
    modality = vocab.modality_of(document.ids)
    edges = np.flatnonzero((np.diff(modality) != 0) | np.diff(document.loss_mask)) + 1
    for start, end in itertools.pairwise((0, *edges.tolist(), len(document))):
        if modality[start] == Modality.TEXT:
            # Role markers may lie beyond the tokenizer's ids. Like the tokenizer's special tokens, they print nothing.
            ids = document.ids[start:end]
            part = tokenizer.decode(ids[ids < tokenizer.vocab_size].tolist())
        elif modality[start] == Modality.AUDIO:
            frames = vocab.codec_layout.is_leading(document.ids[start:end]).sum()
            part = f"<{frames} frames>" if frames else ""
        else:
            part = f"<{end - start} {vocab.modality_names[modality[start]]}>"
        if part:
            parts.append(f"[{part}]" if document.loss_mask[start] else part)
    return " ".join(parts)


def audio_of(document: Document, vocab: VocabLayout) -> Sequence[np.ndarray]:
    """The codes ``[F, C]`` of each audio segment; raises :class:`DataError` if the document has none."""
    segments = vocab.audio_segments(document.ids)
    if not segments:
        raise DataError("the document holds no audio")
    layout, side_codes = vocab.codec_layout, document.side_codes
    return [
        layout.decode(document.ids[start:end], None if side_codes is None else side_codes[start:end])
        for start, end in segments
    ]
