"""What a source of data is: a class that knows one published layout on disk and yields records."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from megatron_most.data.preparation.manifest import Record, Rejection
from megatron_most.data.preparation.sources.roots import Roots
from megatron_most.data.storage.json_lines import Line, read_lines
from megatron_most.errors import ConfigError, DataError

WRITTEN_BESIDE = (".quarantine.jsonl", ".provenance.json")
"""What ``most prepare`` itself writes beside a manifest; a folder of manifests may hold it, and it is no data."""

_HELD_OUT = {"dev", "eval", "evaluation", "heldout", "test", "val", "valid", "validation"}


@dataclass(frozen=True)
class SourceOptions:
    """What a user may say of any source.

    splits: only these parts; empty takes all but those that are held out (:func:`is_held_out`).
    lower_case: whether texts without any lower-case letter become lower case.
    language, license: of every record that does not name its own.
    text_field: which of several texts is meant; None takes the source's first choice.
    needs_text: whether audio without a text is refused.
    """

    splits: tuple[str, ...] = ()
    language: str | None = None
    license: str | None = None
    text_field: str | None = None
    needs_text: bool = True
    lower_case: bool = False


class Source(ABC):
    """One data set in its published layout below ``root`` (a folder, or for some sources a file).

    A new source is a subclass with a ``name``, a ``layout`` and :meth:`records`, listed in ``SOURCES``.
    """

    name: ClassVar[str]
    layout: ClassVar[str]
    """One line for ``--help``: which files are read."""

    license: ClassVar[str | None] = None
    """Under which the data set is published, where that is known."""

    has_audio: ClassVar[bool] = True

    def __init__(
        self, root: str | Path, options: SourceOptions | None = None, further_roots: Sequence[str | Path] = ()
    ) -> None:
        # Absolute: audio paths that start with it must mean the same wherever they are resolved.
        self.root = Path(os.path.abspath(root))
        self.options = options or SourceOptions()
        if not self.root.exists():
            raise DataError(f"{root}: no such manifest or folder")
        self.roots = Roots([self.folder, *further_roots])

    @property
    def folder(self) -> Path:
        """Where relative audio paths start."""
        return self.root if self.root.is_dir() else self.root.parent

    @abstractmethod
    def records(self) -> Iterator[Record | Rejection]:
        """Every record, or why there is none in its place, in an order that is always the same.

        Audio paths may be relative to :attr:`folder`; that they exist, lie inside the given folders and that ids
        differ is checked by whoever reads the source. Raises DataError where a whole file cannot be read.
        """

    def files(self, *patterns: str) -> list[Path]:
        """The root itself if it is no folder, else the files below it that match; sorted, of the wanted splits."""
        if not self.root.is_dir():
            return [self.root]
        found = sorted({path for pattern in patterns for path in self.root.glob(pattern)})
        found = [path for path in found if not path.name.endswith(WRITTEN_BESIDE)]
        if not found:
            raise DataError(f"{self.root}: holds no {' or '.join(patterns)}")
        splits = choose_splits(sorted({self._split_of(path) for path in found}), self.options.splits, self.root)
        return [path for path in found if self._split_of(path) in splits]

    def real(self, path: Path) -> Path:
        """Where a file of the source really is: the one that a user named, or one that lies inside the roots."""
        if path != self.root:
            return self.roots.resolve(path)
        if not path.is_file():
            raise DataError(f"{path}: not a regular file")
        return path

    def lines(self, path: Path) -> Iterator[Line]:
        """The lines of a file of the source."""
        return read_lines(self.real(path))

    def table(self, path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str] | Rejection]]:
        """Rows of a tab-separated table with a header and no quoting: where each stands, and its fields.

        Raises:
            DataError: a header without one of ``columns``.
        """
        lines = self.lines(path)
        header = next(lines, Line(1, "")).text.split("\t")
        for column in columns:
            if column not in header:
                raise DataError(f"{path}: has no column {column!r}: {', '.join(header)}")
        for line in lines:
            where = f"{path}, line {line.number}"
            fields = line.text.split("\t")
            if line.problem:
                yield where, Rejection(where, line.problem)
            elif len(fields) == len(header):
                yield where, dict(zip(header, fields, strict=True))
            elif line.text.strip():
                yield where, Rejection(where, f"has {len(fields)} columns, the header has {len(header)}")

    def _split_of(self, path: Path) -> str:
        """The split a file is: its name up to the first dot."""
        return path.name.split(".")[0]


def is_held_out(split: str) -> bool:
    """Whether a split's name says that nothing is to be trained on it: ``dev-clean``, ``test``, ``validation`` ..."""
    return not _HELD_OUT.isdisjoint(re.split(r"[^a-z]+", split.lower()))


def choose_splits(found: Sequence[str], wanted: Sequence[str], root: Path) -> list[str]:
    """The wanted ones of the splits that were found; where none is named, all that may be trained on.

    Raises:
        ConfigError: a split that is not there, or only held-out ones and none named.
    """
    for split in wanted:
        if split not in found:
            raise ConfigError(f"split {split}: {root} holds {', '.join(found) or 'no split'}")
    chosen = [split for split in found if (split in wanted if wanted else not is_held_out(split))]
    if found and not chosen:
        raise ConfigError(f"{root}: holds only {', '.join(found)}, which are not for training; name them with --split")
    return chosen
