"""A source: a class that reads one published layout and yields records."""

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
"""Endings of files that ``most prepare`` writes beside a manifest; they are not read as data."""

_HELD_OUT = {"dev", "eval", "evaluation", "heldout", "test", "val", "valid", "validation"}


@dataclass(frozen=True)
class SourceOptions:
    """Options of every source.

    splits: only these parts; empty takes all but those that are held out (:func:`is_held_out`).
    lower_case: whether texts without any lower-case letter become lower case.
    language, license: for records that do not name their own.
    text_field: which text to read if the source has several; None takes the source's default.
    needs_text: whether audio without text is rejected.
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
    """License of the published data set, if known."""

    has_audio: ClassVar[bool] = True

    def __init__(
        self, root: str | Path, options: SourceOptions | None = None, further_roots: Sequence[str | Path] = ()
    ) -> None:
        # Absolute, so that audio paths below it do not depend on the working directory.
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
        """Every record, or the reason why one cannot be used, always in the same order.

        Audio paths may be relative to :attr:`folder`. The caller checks that they exist inside the given folders and
        that ids are unique. Raises DataError if a whole file cannot be read.
        """

    def files(self, *patterns: str) -> list[Path]:
        """The root if it is a file; otherwise the matching files below it that belong to the chosen splits, sorted."""
        if not self.root.is_dir():
            return [self.root]
        found = sorted({path for pattern in patterns for path in self.root.glob(pattern)})
        found = [path for path in found if not path.name.endswith(WRITTEN_BESIDE)]
        if not found:
            raise DataError(f"{self.root}: holds no {' or '.join(patterns)}")
        splits = choose_splits(sorted({self._split_of(path) for path in found}), self.options.splits, self.root)
        return [path for path in found if self._split_of(path) in splits]

    def real(self, path: Path) -> Path:
        """The real path of a file that the user named, or that lies inside the roots."""
        if path != self.root:
            return self.roots.resolve(path)
        if not path.is_file():
            raise DataError(f"{path}: not a regular file")
        return path

    def lines(self, path: Path) -> Iterator[Line]:
        """The lines of a file of the source."""
        return read_lines(self.real(path))

    def table(self, path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str] | Rejection]]:
        """Rows of a tab-separated table with a header and no quoting: file and line, and the fields.

        Raises:
            DataError: the header lacks one of ``columns``.
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
        """The split that a file belongs to: its name up to the first dot."""
        return path.name.split(".")[0]


def is_held_out(split: str) -> bool:
    """Whether a split's name says that it is not for training: ``dev-clean``, ``test``, ``validation`` ..."""
    return not _HELD_OUT.isdisjoint(re.split(r"[^a-z]+", split.lower()))


def choose_splits(found: Sequence[str], wanted: Sequence[str], root: Path) -> list[str]:
    """The wanted splits; without any, all that are not held out.

    Raises:
        ConfigError: a wanted split is missing, or none is wanted and all are held out.
    """
    for split in wanted:
        if split not in found:
            raise ConfigError(f"split {split}: {root} holds {', '.join(found) or 'no split'}")
    chosen = [split for split in found if (split in wanted if wanted else not is_held_out(split))]
    if found and not chosen:
        raise ConfigError(f"{root}: holds only {', '.join(found)}, which are not for training; name them with --split")
    return chosen
