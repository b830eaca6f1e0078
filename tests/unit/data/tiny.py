"""Tiny codecs, tokenizers and datasets for the tests of the data pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile

from megatron_most.config import RunConfig
from megatron_most.config.load import build_config
from megatron_most.data.building.tasks import ChatTurn, make_chat, make_document, make_interleaved
from megatron_most.data.loading.blend import Row
from megatron_most.data.storage.codes import CodecIdentity, CodesDataset
from megatron_most.data.storage.documents import Document
from megatron_most.data.storage.indexed import ArrayWriter
from megatron_most.data.storage.sidecar import write_sidecar
from megatron_most.data.storage.token_dataset import DatasetWriter, TokenDataset
from megatron_most.vocab import CODEC_LAYOUTS, VocabLayout

CODEBOOKS, CODEBOOK_SIZE, TEXT_VOCAB = 3, 50, 40
LAYOUTS = tuple(CODEC_LAYOUTS)


def layout(name: str = "frame") -> VocabLayout:
    return VocabLayout(TEXT_VOCAB, CODEBOOKS, CODEBOOK_SIZE, name)


class LetterTokenizer:
    """Letters a to z and the space as ids 3 to 29; anything else is dropped."""

    vocab_size, bos_id, eos_id, pad_id, fingerprint = 30, 1, 2, 0, "letters"

    def encode(self, text: str) -> list[int]:
        return [
            29 if letter == " " else ord(letter) - 94 for letter in text.lower() if letter == " " or letter.isalpha()
        ]

    def special_id(self, token: str) -> int | None:
        return None

    def decode(self, ids) -> str:
        return "".join(" " if token == 29 else chr(token + 94) for token in ids if token > 2)


class LoudnessCodec:
    """A codec without NeMo: 100 samples a frame, codes from the samples' magnitudes."""

    name, fingerprint = "loudness", "0" * 64
    num_codebooks, codebook_size, sample_rate, samples_per_frame = CODEBOOKS, CODEBOOK_SIZE, 8000, 100
    frame_rate, min_samples = 80.0, 100

    def encode(self, waveform: np.ndarray) -> np.ndarray:
        frames = np.pad(waveform, (0, -len(waveform) % 100)).reshape(-1, 100)
        loudness = np.abs(frames).mean(axis=1)
        return np.stack([(loudness * scale).astype(np.int64) % CODEBOOK_SIZE for scale in (10, 1000, 100000)], axis=1)

    def batch_shape(self, num_samples: int) -> tuple[int, int]:
        return 3, -(-num_samples // 100) * 100

    def encode_batch(self, waveforms) -> list[np.ndarray]:
        return [self.encode(waveform) for waveform in waveforms]

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return np.repeat(codes[:, 0] / 10, 100).astype(np.float32)


def random_codes(num_frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CODEBOOK_SIZE, (CODEBOOKS, num_frames)).T


def example_document(task: str, vocab: VocabLayout, text: str, codes: np.ndarray, **options) -> Document:
    """A document of any task. In chat both turns are spoken; interleaved documents begin with text."""
    if task == "interleaved":
        return make_interleaved(vocab, LetterTokenizer(), [text, codes], **options)
    if task == "chat":
        turns = [ChatTurn("user", text, codes), ChatTurn("assistant", text, codes)]
        return make_chat(vocab, LetterTokenizer(), turns, **options)
    given = {"text": None if task == "speech_lm" else text, "codes": None if task == "text_lm" else codes}
    return make_document(task, vocab, LetterTokenizer(), **given, **options)


def joined(documents: list[Document]) -> Document:
    """The documents, concatenated."""
    starts = np.cumsum([0, *map(len, documents)])
    whole = Document(*(np.concatenate([getattr(item, name) for item in documents]) for name in ("ids", "loss_mask")))
    if documents[0].codes is not None:
        whole.coded = np.concatenate([item.coded + start for item, start in zip(documents, starts, strict=False)])
        whole.codes = np.concatenate([item.codes for item in documents])
    return whole


def row_of(documents: list[Document], task: int = 0) -> Row:
    """A row of the documents, with nothing hidden."""
    return Row(task, joined(documents), np.array([len(document) for document in documents]))


def parts_of(row: Row) -> list[Document]:
    """The documents of a row, one by one."""
    whole, parts = row.document, []
    for start, end in zip(np.cumsum([0, *row.lengths[:-1]]), np.cumsum(row.lengths), strict=True):
        parts.append(Document(whole.ids[start:end], whole.loss_mask[start:end]))
        if whole.codes is not None:
            inside = (whole.coded >= start) & (whole.coded < end)
            parts[-1].coded, parts[-1].codes = whole.coded[inside] - start, whole.codes[inside]
    return parts


def hidden_of(row: Row) -> list[np.ndarray]:
    """The hidden positions of each document of a row."""
    return np.split(row.hidden, np.cumsum(row.lengths)[:-1])


def write_dataset(
    prefix: Path, task: str, num_documents: int, *, layout_name: str = "frame", seed: int = 0, provenance=None
) -> TokenDataset:
    """Documents of random length; the text of document i spells i, so that all documents differ."""
    generator = np.random.default_rng(seed)
    vocab = layout(layout_name)
    with DatasetWriter(prefix, task, vocab) as writer:
        for index in range(num_documents):
            num_frames = 1 if task == "text_lm" else int(generator.integers(1, 7))
            text = "".join("abcdefghij"[int(digit)] for digit in str(index)) + "z" * int(generator.integers(0, 5))
            writer.add(example_document(task, vocab, text, random_codes(num_frames, seed=index)))
        writer.commit(provenance or {})
    return TokenDataset(prefix)


def write_codes(
    prefix: Path, utterances: list[tuple[str, str, np.ndarray]], fingerprint: str = "0" * 64
) -> CodesDataset:
    """Tokenized speech: ids, texts and codes ``[F, C]``."""
    writer = ArrayWriter(f"{prefix}.codes", np.uint8)
    entries = []
    for name, text, codes in utterances:
        writer.add(codes.reshape(-1))
        entries.append({"id": name, "text": text, "num_frames": len(codes)})
    writer.commit()
    Path(f"{prefix}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    codec = CodecIdentity.of(LoudnessCodec()).to_dict()
    write_sidecar(f"{prefix}.json", {"codec": codec, "source": {"licenses": {"CC0": 1}}})
    return CodesDataset(prefix)


def write_wavs(folder: Path, num_files: int, seconds: float = 0.2) -> list[dict]:
    """Noise files and their manifest entries."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for index in range(num_files):
        samples = np.random.default_rng(index).uniform(-0.9, 0.9, round(8000 * seconds) + 37 * (index % 5))
        soundfile.write(folder / f"{index}.wav", samples, 8000)
        entries.append(
            {"audio_filepath": f"{folder.name}/{index}.wav", "duration": len(samples) / 8000, "text": f"w{index}"}
        )
    return entries


def run_config(train: list[tuple[Path, float]], validation: list[Path] = (), **overrides) -> RunConfig:
    """A configuration for the tiny layout; ``overrides`` go to ``data``, ``training`` or the top by their names."""
    values: dict = {
        "vocab": layout(overrides.pop("layout_name", "frame")).to_dict(),
        "data": {
            "train": [{"path": str(path), "weight": weight} for path, weight in train],
            "validation": [{"path": str(path)} for path in validation],
            "seq_length": 64,
        },
        "training": {"micro_batch_size": 1, "global_batch_size": 8},
    }
    for name, value in overrides.items():
        if name in ("seq_length", "packing", "document_multiple", "audio_frame_dropout", "audio_share"):
            values["data"][name] = value
        elif name in ("micro_batch_size", "global_batch_size", "eval_iters"):
            values["training"][name] = value
        else:
            values[name] = value
    return build_config("test", values)
