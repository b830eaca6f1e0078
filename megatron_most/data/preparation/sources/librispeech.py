"""LibriSpeech (openslr.org/12) and what shares its layout: a folder a speaker, a chapter, and its transcripts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_most.data.preparation.manifest import Record, Rejection
from megatron_most.data.preparation.sources.base import Source, choose_splits


class LibriSpeech(Source):
    name = "librispeech"
    layout = "SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt, the FLAC files beside it; splits are folders"
    license = "CC BY 4.0"

    def records(self) -> Iterator[Record | Rejection]:
        found = sorted({path.parents[2].name for path in self.root.glob("*/*/*/*.trans.txt")})
        for split in choose_splits(found, self.options.splits, self.root):
            for transcripts in sorted(self.root.glob(f"{split}/*/*/*.trans.txt")):
                yield from self._chapter(transcripts, split)

    def _chapter(self, transcripts: Path, split: str) -> Iterator[Record | Rejection]:
        for line in self.lines(transcripts):
            where = f"{transcripts}, line {line.number}"
            name, _, text = line.text.partition(" ")
            if line.problem:
                yield Rejection(where, line.problem)
            elif not name and text:
                yield Rejection(where, "has no id before the transcript")
            elif name:
                yield Record(
                    id=name,
                    text=text.strip(),
                    audio=transcripts.parent / f"{name}.flac",
                    offset=None,
                    duration=None,
                    language="en",
                    speaker=transcripts.parents[1].name,
                    split=split,
                    where=where,
                )
