"""VoxPopuli (github.com/facebookresearch/voxpopuli): transcribed speech of one language."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_most.data.preparation.manifest import Record, Rejection
from megatron_most.data.preparation.sources.base import Source, choose_splits
from megatron_most.errors import ConfigError, DataError

_SPLITS = ("train", "dev", "test")
_TEXTS = ("normalized_text", "raw_text")
_ENDINGS = (".ogg", ".wav")


class VoxPopuli(Source):
    """What ``get_asr_data`` makes (``asr_train.tsv``, ``YEAR/ID.ogg``) and what the Hugging Face hub holds, unpacked
    (``asr_train.tsv``, ``train/**/ID.wav``)."""

    name = "voxpopuli"
    layout = "transcribed_data/LANGUAGE: asr_train.tsv ..., YEAR/ID.ogg; text-field raw_text has case and punctuation"
    license = "CC0-1.0"

    def records(self) -> Iterator[Record | Rejection]:
        field = self.options.text_field or _TEXTS[0]
        if field not in _TEXTS:
            raise ConfigError(f"text field {field}: must be one of {', '.join(_TEXTS)}")
        found = [split for split in _SPLITS if (self.root / f"asr_{split}.tsv").is_file()]
        for split in choose_splits(found, self.options.splits, self.root):
            audio = self._audio(split)
            for where, row in self.table(self.root / f"asr_{split}.tsv", ("id", "speaker_id", *_TEXTS)):
                if isinstance(row, Rejection):
                    yield row
                    continue
                speaker = row["speaker_id"]
                yield Record(
                    id=row["id"],
                    text=row[field].strip(),
                    audio=audio.get(row["id"], self.root / row["id"][:4] / f"{row['id']}.ogg"),
                    offset=None,
                    duration=None,
                    language=self.root.name,
                    speaker=None if speaker in ("", "None") else speaker,
                    split=split,
                    where=where,
                )

    def _audio(self, split: str) -> dict[str, Path]:
        """Id -> file. Years are folders of their own; a split's folder holds parts, at any depth."""
        folders = [*sorted(self.root.glob("[0-9][0-9][0-9][0-9]")), self.root / split]
        files = (path for folder in folders for path in folder.rglob("*") if path.suffix in _ENDINGS)
        found = {path.stem: path for path in sorted(files)}
        if not found:
            raise DataError(f"{self.root}: holds no audio below YEAR/ or {split}/")
        return found
