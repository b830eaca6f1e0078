"""StoryCloze, topic StoryCloze (arXiv 2305.13009) and SALMon (arXiv 2409.07437), in the layouts of their authors."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from megatron_most.errors import ConfigError, DataError
from megatron_most.evaluation.suites.pairs import Pair, PairSuite

MODALITIES = ("S-S", "T-S", "S-T", "T-T")
SALMON_PARTS = (
    "bg_alignment",
    "bg_all_consistency",
    "bg_domain_consistency",
    "gender_consistency",
    "rir_consistency",
    "sentiment_alignment",
    "sentiment_consistency",
    "speaker_consistency",
)


class StoryCloze(PairSuite):
    """A story with its ending against the same story with another's.

    Two layouts:

        <number>_*.wav                            in the order of the numbers, a true story and then a false one
        <id>_{mutual,correct,incorrect}.{wav,txt} the story so far and both endings, which can be spoken or written

    Files may stand in subfolders, each with its own numbers.

    Args:
        folder: sSC (an ending of the same topic) or tSC (a random ending).
        modalities: of the story so far and of its ending, ``S`` spoken and ``T`` written; for the second layout.
    """

    name = "storycloze"

    def __init__(self, folder: str | Path, modalities: str = "S-S", limit: int | None = None) -> None:
        if modalities not in MODALITIES:
            raise ConfigError(f"--modalities={modalities}: must be one of {', '.join(MODALITIES)}")
        self.path, self.modalities = Path(folder), modalities
        super().__init__(f"{self.path.name}" if modalities == "S-S" else f"{self.path.name} {modalities}", limit)

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "modalities": self.modalities}

    def read(self) -> list[Pair]:
        if not self.path.is_dir():
            raise DataError(f"{self.path}: no such folder")
        files = sorted(path for path in self.path.rglob("*") if path.suffix in (".wav", ".txt"))
        parts = [path for path in files if path.stem.endswith("_correct")]
        pairs = self._triples(parts) if parts else self._numbered([path for path in files if path.suffix == ".wav"])
        if not pairs:
            raise DataError(f"{self.path}: holds no stories: no <number>_*.wav and no <id>_correct.wav")
        return pairs

    def _triples(self, correct: list[Path]) -> list[Pair]:
        story, ending = (".wav" if kind == "S" else ".txt" for kind in self.modalities.split("-"))
        stems = sorted({path.with_name(path.stem.removesuffix("_correct")) for path in correct})
        return [
            Pair(
                str(stem.relative_to(self.path)),
                str(stem.relative_to(self.path)),
                stem.with_name(f"{stem.name}_correct{ending}"),
                stem.with_name(f"{stem.name}_incorrect{ending}"),
                stem.with_name(f"{stem.name}_mutual{story}"),
            )
            for stem in stems
        ]

    def _numbered(self, files: list[Path]) -> list[Pair]:
        if files and self.modalities != "S-S":
            raise ConfigError(f"--modalities={self.modalities}: {self.path} has recordings of whole stories alone")
        pairs = []
        for folder in sorted({path.parent for path in files}):
            inside = sorted((_number(path), path) for path in files if path.parent == folder)
            twice = [number for number, count in Counter(number for number, _ in inside).items() if count > 1]
            if twice:
                raise DataError(
                    f"{folder}: number {twice[0]} occurs twice; a story and its counterpart follow each other"
                )
            if len(inside) % 2:
                raise DataError(f"{folder}: holds {len(inside)} stories; each must have its counterpart")
            for (_, true), (_, false) in zip(inside[::2], inside[1::2], strict=True):
                name = str(true.relative_to(self.path).with_suffix(""))
                pairs.append(Pair(name, name, true, false))
        return pairs


class Salmon(PairSuite):
    """Recordings against ones with a change that one hears: of the speaker, the room, the mood.

    ``<part>/sample_<index>_*.wav`` for the eight parts; of the two files of an index, the first in order of names is
    the unchanged one.
    """

    name = "salmon"

    def __init__(self, folder: str | Path, limit: int | None = None) -> None:
        self.path = Path(folder)
        super().__init__(self.path.name, limit)

    def read(self) -> list[Pair]:
        pairs = []
        for part in SALMON_PARTS:
            folder = self.path / part
            if not folder.is_dir():
                raise DataError(f"{folder}: no such folder; SALMon has {', '.join(SALMON_PARTS)}")
            members: dict[int, list[Path]] = {}
            for path in sorted(folder.glob("*.wav")):
                members.setdefault(_number(path, place=1), []).append(path)
            if not members:
                raise DataError(f"{folder}: holds no sample_<index>_*.wav")
            for index, files in sorted(members.items()):
                if len(files) != 2:
                    raise DataError(f"{folder}: sample {index} has {len(files)} files, must have 2")
                identity = f"{part}/{index}"
                pairs.append(Pair(identity, identity, files[0], files[1], groups={"part": part}))
        return pairs


def _number(path: Path, place: int = 0) -> int:
    """The number at a place of a name whose parts are joined by ``_``."""
    parts = path.stem.split("_")
    if len(parts) <= place or not parts[place].isdecimal():
        raise DataError(f"{path}: part {place + 1} of its name, between underscores, must be a number")
    return int(parts[place])
