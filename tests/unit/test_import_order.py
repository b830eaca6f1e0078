"""The layers of CONTRIBUTING.md: a lower one never imports a higher one, not even inside a function."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LAYERS = (
    ("errors", "files", "lazy", "cli", "platform", "codec_layouts", "vocab"),
    ("config",),
    ("audio", "text"),
    ("parallel",),
    ("data",),
    ("precision",),
    ("moe",),
    ("model",),
    ("checkpointing",),
    ("training",),
    ("conversion", "inference"),
    ("evaluation", "planning"),
    ("sweep", "report"),
    ("commands",),
    ("tools", "examples"),
)
HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer}
PACKAGE = "megatron_most"


def part_of_file(path: Path) -> str | None:
    """The part of the project a file (relative to the root) belongs to; None for ``megatron_most/__init__.py``."""
    names = path.with_suffix("").parts
    part = names[1] if names[0] == PACKAGE else names[0]
    return None if part == "__init__" else part


def parts_imported(source: str, path: Path) -> Iterator[tuple[int, str]]:
    """Line and part of each import of the project's own, at any depth of the file."""
    folder = path.parent.parts
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(folder[: len(folder) - node.level + 1]) if node.level else ""
            stem = ".".join(filter(None, (base, node.module)))
            # `from megatron_most import platform` imports a part; `from megatron_most.model import x` a name in one.
            modules = [f"{stem}.{alias.name}" for alias in node.names] if stem == PACKAGE else [stem]
        else:
            continue
        for module in modules:
            names = module.split(".")
            if names[0] == PACKAGE and len(names) > 1 and names[1] != "__version__":
                yield node.lineno, names[1]
            elif names[0] in LAYERS[-1]:
                yield node.lineno, names[0]


def violations(source: str, path: Path) -> list[str]:
    """What is wrong with the imports of one file, a line each; ``path`` is relative to the root."""
    part = part_of_file(path)
    if part is not None and part not in HEIGHT:
        return [f"{path}: {part} is in no layer; give it a place in LAYERS"]
    found = []
    for line, imported in parts_imported(source, path):
        if imported not in HEIGHT:
            found.append(f"{path}:{line}: imports {imported}, which is in no layer")
        elif part is None or HEIGHT[imported] > HEIGHT[part]:
            found.append(f"{path}:{line}: {part or PACKAGE} imports {imported}, which is above it")
    return found


def project_files() -> list[Path]:
    folders = (PACKAGE, "tools", "examples")
    return sorted(path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_no_file_imports_a_higher_layer():
    files = project_files()
    assert len(files) > 20
    found = [line for path in files for line in violations((ROOT / path).read_text(), path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("megatron_most/moe/x.py", "from megatron_most.model import build_model"),
        ("megatron_most/moe/x.py", "import megatron_most.training.loss"),
        ("megatron_most/moe/x.py", "from megatron_most import errors, training"),
        ("megatron_most/moe/x.py", "def f():\n    from megatron_most.evaluation.wer import align"),
        ("megatron_most/moe/deep/x.py", "from ...sweep import grid"),
        ("megatron_most/moe/x.py", "from .. import report"),
        ("megatron_most/report/x.py", "from tools import report"),
        ("megatron_most/errors.py", "from megatron_most.config import RunConfig"),
        ("megatron_most/__init__.py", "from megatron_most.errors import MostError"),
        ("megatron_most/utils/x.py", "import os"),
        ("megatron_most/moe/x.py", "from megatron_most.utils import helper"),
    ],
)
def test_a_violation_is_caught(path, source):
    assert len(violations(source, Path(path))) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("megatron_most/moe/x.py", "import torch\nfrom megatron.core import tensor_parallel"),
        ("megatron_most/moe/x.py", "from megatron_most.moe.router import Router\nfrom . import balance"),
        ("megatron_most/model/x.py", "from ..moe.router import Router\nfrom megatron_most import platform"),
        ("megatron_most/vocab.py", "from megatron_most.errors import DataError"),
        ("megatron_most/report/x.py", "from megatron_most import __version__"),
        ("tools/x.py", "from megatron_most.report import write_report"),
    ],
)
def test_an_import_downwards_is_allowed(path, source):
    assert violations(source, Path(path)) == []
