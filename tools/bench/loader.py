"""Time to build training batches: this project's loader against Megatron's ``GPTDataset`` on the same files.

    python -m tools.bench.loader --documents 20000 --seq-length 4096

A call builds one row of ``seq_length`` positions. For each of the layouts ``flat`` and ``frame``, the arms are

    megatron   ``GPTDataset`` for the ids (concatenated documents, cut at the end of the row), and reads of the loss
               masks (and codes, in ``frame``) of as many documents from ``IndexedDataset``, as int64, not assembled
    ids alone  ``GPTDataset`` for the ids
    ours       a batch: ids, labels, loss mask, modality, document boundaries, codes and their labels

Times are per call. The last lines scale them to positions that are not padding.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import types
from pathlib import Path

import numpy as np
import torch

from megatron_most import cli
from megatron_most.config.load import build_config
from megatron_most.data.loading.loader import train_batches
from megatron_most.data.storage.documents import Document
from megatron_most.data.storage.token_dataset import DatasetWriter
from megatron_most.vocab import VocabLayout
from tools.bench import paired

CODEBOOKS, CODEBOOK_SIZE, TEXT_VOCAB = 8, 1000, 32000


def write_documents(prefix: Path, layout: str, num_documents: int) -> VocabLayout:
    """Transcribed speech of 2 to 30 s at 12.5 frames/s: random ids and codes of realistic lengths."""
    vocab = VocabLayout(TEXT_VOCAB, CODEBOOKS, CODEBOOK_SIZE, layout)
    random = np.random.default_rng(0)
    seconds = np.clip(random.lognormal(2.4, 0.6, num_documents), 2, 30)
    with DatasetWriter(prefix, "asr", vocab) as writer:
        for duration in seconds:
            codes = random.integers(0, CODEBOOK_SIZE, (int(12.5 * duration), CODEBOOKS))
            frames, side_codes = vocab.codec_layout.encode(codes)
            text = random.integers(3, TEXT_VOCAB, int(3.3 * duration) + 4)
            ids = np.concatenate([frames, text])
            mask = np.arange(len(ids)) >= len(frames)
            writer.add(
                Document(ids, mask, np.arange(len(frames)), side_codes)
                if vocab.codec_layout.uses_side_codes
                else Document(ids, mask)
            )
        writer.commit({})
    return vocab


def ours(prefix: Path, vocab: VocabLayout, seq_length: int):
    values = {
        "vocab": vocab.to_dict(),
        "data": {"train": [{"path": str(prefix)}], "seq_length": seq_length},
        "training": {"global_batch_size": 8},
    }
    return train_batches(build_config("bench", values), dp_rank=0, dp_size=1, consumed_samples=0)


def megatron(prefix: Path, seq_length: int, folder: Path):
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    # The attributes of a tokenizer that GPTDataset reads.
    tokenizer = types.SimpleNamespace(vocab_size=TEXT_VOCAB, eod=2, pad=1, unique_identifiers={})
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=seq_length,
        blend=([f"{prefix}.ids"], None),
        split="1,0,0",
        path_to_cache=str(folder),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=tokenizer,
    )
    ids = IndexedDataset(f"{prefix}.ids")
    return GPTDataset(ids, f"{prefix}.ids", np.arange(len(ids), dtype=np.int32), 100_000, Split.train, config)


def read_all(prefix: Path, layout: str, ids, documents_per_row: int):
    """A call that reads a row of ids and the other arrays of as many documents as a row holds on average."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    others = [IndexedDataset(f"{prefix}.{part}") for part in (("mask", "codes") if layout == "frame" else ("mask",))]
    order = itertools.cycle(np.random.default_rng(0).permutation(len(others[0])).tolist())
    rows = itertools.cycle(range(len(ids)))

    def call() -> None:
        ids[next(rows)]
        for index in itertools.islice(order, documents_per_row):
            for dataset in others:
                torch.from_numpy(dataset[index].astype(np.int64))

    return call


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--seq-length", type=int, default=4096)
    paired.add_arguments(parser)
    return parser


def bench_loader(arguments: argparse.Namespace) -> None:
    cli.require_positive(arguments, "documents", "seq_length", "blocks", "threads")
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        for layout in ("flat", "frame"):
            prefix = Path(name) / layout
            vocab = write_documents(prefix, layout, arguments.documents)
            sample = list(itertools.islice(ours(prefix, vocab, arguments.seq_length), 300))
            filled = float(np.mean([1 - batch.is_padding.float().mean() for batch in sample]))
            documents_per_row = round(np.mean([len(batch.cu_seqlens) - 1 for batch in sample]))
            reference = megatron(prefix, arguments.seq_length, Path(name) / "cache")
            rows, batches = itertools.cycle(range(len(reference))), ours(prefix, vocab, arguments.seq_length)
            arms = {
                "megatron": read_all(prefix, layout, reference, documents_per_row),
                "ids alone": lambda reference=reference, rows=rows: reference[next(rows)],
                "ours": lambda batches=batches: next(batches),
            }
            comparison = paired.compare(arms, "megatron", arguments.blocks, seconds_per_sample=0.1)
            print(f"layout {layout}: {documents_per_row} documents per row, rows {filled:.1%} full")
            print(comparison)
            print(f"ours: {filled / comparison.wall['ours'].median:.2f} of megatron's positions per second\n")


if __name__ == "__main__":
    cli.run(make_parser(), bench_loader)
