"""Common Voice (commonvoice.mozilla.org): one language of a release."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_most.data.preparation.manifest import Record, Rejection
from megatron_most.data.preparation.sources.base import Source, choose_splits
from megatron_most.errors import DataError

_SPLITS = ("train", "dev", "test", "validated", "other", "invalidated")


class CommonVoice(Source):
    """``validated`` holds the other splits' clips too, so a split has to be chosen; ``train`` without a choice."""

    name = "common_voice"
    layout = "a language's folder: train.tsv, validated.tsv ..., clips/*.mp3; splits are tables (default: train)"
    license = "CC0-1.0"

    def records(self) -> Iterator[Record | Rejection]:
        found = [split for split in _SPLITS if (self.root / f"{split}.tsv").is_file()]
        durations = self._durations()
        for split in choose_splits(found, self.options.splits or ("train",), self.root):
            for where, row in self.table(self.root / f"{split}.tsv", ("path", "sentence", "client_id")):
                if isinstance(row, Rejection):
                    yield row
                    continue
                clip = row["path"]
                yield Record(
                    id=clip.removesuffix(".mp3"),
                    text=row["sentence"].strip(),
                    # Early releases leave the ending out.
                    audio=self.root / "clips" / (clip if clip.endswith(".mp3") else f"{clip}.mp3"),
                    offset=None,
                    duration=durations.get(clip),
                    language=row.get("locale") or self.root.name,
                    speaker=row["client_id"] or None,
                    split=split,
                    where=where,
                )

    def _durations(self) -> dict[str, float]:
        """Seconds of each clip, which releases since 2023 list in milliseconds."""
        path = self.root / "clip_durations.tsv"
        if not path.is_file():
            return {}
        durations = {}
        for line in self.lines(path):
            clip, _, milliseconds = line.text.partition("\t")
            if line.number > 1 and clip:
                if not milliseconds.isdigit() or int(milliseconds) == 0:
                    raise DataError(f"{path}, line {line.number}: {milliseconds!r}: must be milliseconds above 0")
                durations[clip] = int(milliseconds) / 1000
        return durations
