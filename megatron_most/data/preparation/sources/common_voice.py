"""Common Voice (commonvoice.mozilla.org): one language of a release."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_most.data.preparation.manifest import Record, Rejection
from megatron_most.data.preparation.sources.base import Source, choose_splits
from megatron_most.data.storage.json_lines import MAX_SECONDS

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
                duration = durations.get(clip)
                if isinstance(duration, Rejection):
                    yield Rejection(where, f"{duration.where}: {duration.reason}", clip.removesuffix(".mp3"))
                    continue
                yield Record(
                    id=clip.removesuffix(".mp3"),
                    text=_unquoted(row["sentence"]).strip(),
                    # Early releases leave the ending out.
                    audio=self.root / "clips" / (clip if clip.endswith(".mp3") else f"{clip}.mp3"),
                    offset=None,
                    duration=duration,
                    language=row.get("locale") or self.root.name,
                    speaker=row["client_id"] or None,
                    split=split,
                    where=where,
                )

    def _durations(self) -> dict[str, float | Rejection]:
        """Seconds of each clip, which releases since 2023 list in milliseconds, or why they cannot be used."""
        path = self.root / "clip_durations.tsv"
        if not path.is_file():
            return {}
        durations: dict[str, float | Rejection] = {}
        for line in self.lines(path):
            clip, _, milliseconds = line.text.partition("\t")
            if line.number > 1 and clip:
                try:
                    seconds = float(milliseconds) / 1000
                except ValueError:
                    seconds = 0.0
                if 0 < seconds <= MAX_SECONDS:
                    durations[clip] = seconds
                else:
                    reason = f"duration {milliseconds[:20]!r}: must be milliseconds above 0"
                    durations[clip] = Rejection(f"{path.name}, line {line.number}", reason)
        return durations


def _unquoted(field: str) -> str:
    """A field as it was before releases up to version 5 wrote it as CSV; later ones write fields as they are.

    CSV quotes a field that holds a quote, and doubles that: quotes around a field without a doubled one are its own.
    """
    inner = field[1:-1]
    is_quoted = len(field) >= 2 and field[0] == field[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if is_quoted and (not inner or '""' in inner) else field
