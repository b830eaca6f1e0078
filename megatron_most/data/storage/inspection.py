"""What datasets hold: counts, hours, lengths, duplicates; and single documents as text and sound."""

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
"""Characters of the histogram's longest bar."""


def summary(dataset: TokenDataset) -> str:
    """One line."""
    counts = dataset.provenance["counts"]
    return (
        f"{dataset.prefix}: task {dataset.task}, layout {dataset.vocab.layout}, {counts['documents']} documents,"
        f" {counts['positions']} positions ({counts['target_positions']} with loss),"
        f" {counts['audio_frames']} audio frames"
    )


def audio_seconds(dataset: TokenDataset) -> float | None:
    """Seconds of audio, in whole codec frames; None when the dataset was made without a codec."""
    codec = dataset.provenance["codec"]
    return dataset.provenance["counts"]["audio_frames"] / codec["frame_rate"] if codec else None


def statistics(dataset: TokenDataset) -> list[str]:
    """Audio, positions of each modality, duplicates and lengths, a line each, and the histogram of lengths."""
    codec, seconds = dataset.provenance["codec"], audio_seconds(dataset)
    lines = []
    if codec:
        lines.append(
            f"audio: {seconds / 3600:.2f} h at {codec['sample_rate']} Hz, {codec['frame_rate']:g} frames/s, first"
            f" {dataset.vocab.num_codebooks} of {codec['num_codebooks']} codebooks, codec {codec['name']}"
        )
    total = sum(dataset.input_positions.values())
    shares = (f"{name} {count} ({count / total:.1%})" for name, count in dataset.input_positions.items())
    lines.append(f"input positions: {total}: {', '.join(shares)}")
    lines.append(f"duplicates: {num_duplicates(dataset)} documents are equal to an earlier one")
    quantiles = np.percentile(dataset.lengths, (0, 50, 95, 100)).astype(int)
    lines.append("positions a document: least {}, median {}, 95 % at most {}, most {}".format(*quantiles))
    return lines + histogram(dataset.lengths)


def totals(datasets: Iterable[TokenDataset]) -> list[str]:
    """Documents, hours and positions of each modality over several datasets, by task and in all."""
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
    """Bars of how many documents have about which length, a line each."""
    edges = np.unique(np.linspace(lengths.min(), lengths.max() + 1, num_bins + 1).astype(int))
    counts, _ = np.histogram(lengths, bins=edges)
    width = len(str(edges[-1]))
    lines = []
    for start, end, count in zip(edges[:-1], edges[1:], counts, strict=True):
        bar = "#" * -(-int(count) * BAR // int(counts.max()))
        lines.append(f"{start:>{width}}..{end - 1:<{width}} {bar} {count}")
    return lines


def num_duplicates(dataset: TokenDataset) -> int:
    """Documents whose ids and codes are those of an earlier one."""
    digests = {dataset.digest(index) for index in range(len(dataset))}
    return len(dataset) - len(digests)


def describe(document: Document, vocab: VocabLayout, tokenizer: TextTokenizer) -> str:
    """One line: text as text, audio as a number of frames, other modalities as a number of ids, targets in brackets."""
    parts = []
    modality = vocab.modality_of(document.ids)
    edges = np.flatnonzero((np.diff(modality) != 0) | np.diff(document.loss_mask)) + 1
    for start, end in itertools.pairwise((0, *edges.tolist(), len(document))):
        if modality[start] == Modality.TEXT:
            # Ids beyond the tokenizer's are markers of the layout, and as silent as the tokenizer's own.
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
    """The codes ``[F, C]`` of each audio segment of a document; raises :class:`DataError` when there is none."""
    segments = vocab.audio_segments(document.ids)
    if not segments:
        raise DataError("the document holds no audio")
    layout, side_codes = vocab.codec_layout, document.side_codes
    return [
        layout.decode(document.ids[start:end], None if side_codes is None else side_codes[start:end])
        for start, end in segments
    ]
