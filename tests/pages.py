"""Code blocks of a document, for tests that run or read what its pages show."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w*)$")


@dataclass(frozen=True)
class Block:
    """A code block: the heading that it stands under, the language after its fence, the line of its text, the text."""

    section: str
    language: str
    line: int
    text: str


def code_blocks(page: str | Path) -> list[Block]:
    """The fenced blocks of a page, in order; a relative path is below the repository's root."""
    blocks, section, language, text, start = [], "", "", [], 0
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), start=1):
        fence = FENCE.match(line)
        if start and line == "```":
            blocks.append(Block(section, language, start, "".join(text)))
            start = 0
        elif start:
            text.append(f"{line}\n")
        elif fence:
            language, text, start = fence[1], [], number + 1
        elif line.startswith("#"):
            section = line.lstrip("# ")
    assert not start, f"{page}, line {start - 1}: a code block without an end"
    return blocks


def joined_lines(text: str) -> list[str]:
    """The commands of a block without loops: a line each, continued lines joined."""
    return text.replace("\\\n", " ").strip().splitlines()
