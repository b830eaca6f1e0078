"""The layers of CONTRIBUTING.md: a lower one never imports a higher one, not even inside a function.

Nor does it reach one by a path or start it as a process: strings are read, too. Docstrings and comments may name
anything.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LAYERS = (
    (
        "errors",
        "extras",
        "files",
        "yaml_text",
        "locks",
        "processes",
        "progress",
        "lazy",
        "keys",
        "cli",
        "platform",
        "codec_layouts",
        "vocab",
    ),
    ("config",),
    ("audio", "text"),
    ("parallel",),
    ("data",),
    ("precision",),
    ("moe",),
    ("model",),
    ("checkpointing",),
    ("training",),
    ("conversion", "huggingface", "inference"),
    ("evaluation", "planning"),
    ("sweep", "report", "demo"),
    ("commands",),
    ("tools", "examples"),
)
HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer}
ROOMS = {"data": ("storage", "preparation", "building", "loading")}
"""The rooms of a part, from the lowest up. What stands beside the rooms is above all of them."""
PACKAGE = "megatron_most"


def part_of_file(path: Path) -> str | None:
    """The part of the project a file (relative to the root) belongs to; None for ``megatron_most/__init__.py``."""
    names = path.with_suffix("").parts
    part = names[1] if names[0] == PACKAGE else names[0]
    return None if part == "__init__" else part


def modules_imported(source: str, path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each import, at any depth of the file."""
    folder = path.parent.parts
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(folder[: len(folder) - node.level + 1]) if node.level else ""
            stem = ".".join(filter(None, (base, node.module)))
            # `from megatron_most import platform` imports a part, and `from megatron_most.data import loading` a room.
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)


def parts_imported(source: str, path: Path) -> Iterator[tuple[int, str]]:
    """Line and part of each import of the project's own."""
    for line, module in modules_imported(source, path):
        names = module.split(".")
        if names[0] == PACKAGE and len(names) > 1 and names[1] != "__version__":
            yield line, names[1]
        elif names[0] in LAYERS[-1]:
            yield line, names[0]


MODULE_NAMED = re.compile(rf"\b{PACKAGE}[./](\w+)")
TOP_NAMED = re.compile(rf"(?<![\w.-])({'|'.join(LAYERS[-1])})/\w")
STARTERS = {"run", "Popen", "call", "check_call", "check_output", "system", "popen", "create_subprocess_exec"}
JOINERS = {"Path", "PurePath", "joinpath", "join"}


def named_in(text: str) -> Iterator[str]:
    """The parts of the project that a string names by module or by path."""
    yield from MODULE_NAMED.findall(text)
    yield from TOP_NAMED.findall(text)


def parts_reached(source: str) -> Iterator[tuple[int, str]]:
    """Line and part of each string that names a module or a path of the project's, or starts ``most``."""
    tree = ast.parse(source)
    documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
            yield from ((node.lineno, part) for part in named_in(node.value))
        for folder in path_parts(node):
            if folder in LAYERS[-1]:
                yield node.lineno, folder
        if program(node) == "most":
            yield node.lineno, "commands"


def path_parts(node: ast.AST) -> list[str]:
    """The strings that are put together to a path: ``root / "tools"``, ``Path(root, "tools")``."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        pieces = [node.left, node.right]
    elif isinstance(node, ast.Call) and called(node) in JOINERS:
        pieces = node.args
    else:
        return []
    return [piece.value for piece in pieces if isinstance(piece, ast.Constant) and isinstance(piece.value, str)]


def program(node: ast.AST) -> str | None:
    """The first word of a command: of a list that starts with a string, or of what a starter is called with."""
    first: ast.AST | None = None
    if isinstance(node, ast.List) and node.elts:
        first = node.elts[0]
    elif isinstance(node, ast.Call) and called(node) in STARTERS and node.args:
        first = node.args[0]
    words = first.value.split() if isinstance(first, ast.Constant) and isinstance(first.value, str) else []
    return words[0] if words else None


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def parts_of_script(text: str) -> Iterator[tuple[int, str]]:
    """As :func:`parts_reached`, for a shell script or another file beside the code; comments may name anything."""
    for number, line in enumerate(text.splitlines(), start=1):
        yield from ((number, part) for part in named_in(re.sub(r"(^|\s)#.*", "", line)))


def too_high(path: Path, found: Iterator[tuple[int, str]], how: str) -> list[str]:
    part = part_of_file(path)
    height = -1 if part is None else HEIGHT[part]
    return [
        f"{path}:{line}: {part or PACKAGE} {how} {name}, which is above it"
        for line, name in found
        if HEIGHT.get(name, -1) > height
    ]


def violations(source: str, path: Path) -> list[str]:
    """What is wrong with the imports of one file, a line each; ``path`` is relative to the root."""
    part = part_of_file(path)
    if part is not None and part not in HEIGHT:
        return [f"{path}: {part} is in no layer; give it a place in LAYERS"]
    found = []
    for line, imported in dict.fromkeys(parts_imported(source, path)):
        if imported not in HEIGHT:
            found.append(f"{path}:{line}: imports {imported}, which is in no layer")
        elif part is None or HEIGHT[imported] > HEIGHT[part]:
            found.append(f"{path}:{line}: {part or PACKAGE} imports {imported}, which is above it")
    return found + too_high(path, parts_reached(source), "reaches")


def room_violations(source: str, path: Path) -> list[str]:
    """What is wrong with the imports between the rooms of a part, a line each."""
    names = path.with_suffix("").parts
    if names[0] != PACKAGE or len(names) < 4 or names[1] not in ROOMS:
        return []
    part, room, rooms = names[1], names[2], ROOMS[names[1]]
    if room not in rooms:
        return [f"{path}: {part}/{room} is no room in ROOMS"]
    found = []
    for line, module in dict.fromkeys(modules_imported(source, path)):
        package, *inner = module.split(".")
        if package == PACKAGE and inner[:1] == [part] and len(inner) > 1:
            above = rooms.index(inner[1]) > rooms.index(room) if inner[1] in rooms else True
            if above:
                found.append(f"{path}:{line}: {part}/{room} imports {inner[1]}, which is above it")
    return found


def project_files() -> list[Path]:
    folders = (PACKAGE, "tools", "examples")
    return sorted(path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_no_file_imports_a_higher_layer():
    files = project_files()
    assert len(files) > 20
    found = [line for path in files for line in violations((ROOT / path).read_text(), path)]
    assert not found, "\n".join(found)


def test_no_script_or_template_of_the_package_reaches_a_higher_layer():
    suffixes = {".sh", ".sbatch", ".html", ".js", ".css"}
    files = [path for path in (ROOT / PACKAGE).rglob("*") if path.suffix in suffixes]
    assert {path.suffix for path in files} == suffixes
    for path in files:
        assert too_high(path.relative_to(ROOT), parts_of_script(path.read_text()), "reaches") == []


def test_no_room_imports_a_higher_one():
    files = project_files()
    assert {path.parts[2] for path in files if path.parts[1] == "data" and len(path.parts) > 3} == {*ROOMS["data"]}
    found = [line for path in files for line in room_violations((ROOT / path).read_text(), path)]
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
        # What sweep/job.py did when it started the scripts of a checkout.
        ("megatron_most/sweep/job.py", 'command = [str(ROOT / "examples/launch" / launcher), "--config", config]'),
        ("megatron_most/sweep/job.py", 'command = [sys.executable, str(ROOT / "tools/evaluate.py"), "--suite", suite]'),
        ("megatron_most/sweep/job.py", 'script = ROOT / "tools" / "evaluate.py"'),
        ("megatron_most/sweep/job.py", 'script = os.path.join(root, "tools", "evaluate.py")'),
        ("megatron_most/sweep/job.py", 'script = f"{root}/examples/pretrain_most.py"'),
        ("megatron_most/sweep/job.py", 'call([sys.executable, "-m", "megatron_most.commands.evaluate"])'),
        ("megatron_most/sweep/job.py", 'command = ["most", "evaluate", "--suite", suite]'),
        ("megatron_most/sweep/job.py", 'subprocess.run("most evaluate", shell=True)'),
        ("megatron_most/moe/x.py", 'module = importlib.import_module("megatron_most.model.build")'),
        ("megatron_most/moe/x.py", 'module = importlib.import_module(f"megatron_most.training.{name}")'),
        ("megatron_most/moe/x.py", 'text = open("megatron_most/report/templates/report.css").read()'),
        ("megatron_most/commands/x.py", 'subprocess.run([sys.executable, "tools/report.py"])'),
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
        ("tools/x.py", 'subprocess.run([sys.executable, "-m", "megatron_most.commands.report", "examples/x"])'),
        ("megatron_most/sweep/x.py", 'templates = jinja2.PackageLoader("megatron_most.report")'),
        (
            "megatron_most/moe/x.py",
            '"""See tools/x.py."""\nlimit = 3\n"""See megatron_most.training."""',
        ),
        ("megatron_most/moe/x.py", "print(f\"{counts['examples']} examples; most of them are short\")"),
    ],
)
def test_an_import_downwards_is_allowed(path, source):
    assert violations(source, Path(path)) == []


@pytest.mark.parametrize(
    ("path", "text", "count"),
    [
        ("megatron_most/commands/launchers/x.sh", 'python "$root/tools/doctor.py"', 1),
        (
            "megatron_most/commands/launchers/x.sh",
            "torchrun -m megatron_most.commands.train # as tools/x.py",
            0,
        ),
        ("megatron_most/report/templates/x.html", "<a href='megatron_most/commands/'>", 1),
    ],
)
def test_a_script_is_read_too(path, text, count):
    assert len(too_high(Path(path), parts_of_script(text), "reaches")) == count


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("megatron_most/data/storage/x.py", "from megatron_most.data.loading.blend import Row"),
        ("megatron_most/data/storage/x.py", "import megatron_most.data.preparation.manifest"),
        ("megatron_most/data/preparation/sources/x.py", "from ...building import tasks"),
        ("megatron_most/data/building/x.py", "def f():\n    from megatron_most.data import loading"),
        ("megatron_most/data/storage/x.py", "from megatron_most.data import prose"),
        ("megatron_most/data/cellar/x.py", "import os"),
    ],
)
def test_an_import_of_a_higher_room_is_caught(path, source):
    assert violations(source, Path(path)) == []
    assert len(room_violations(source, Path(path))) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("megatron_most/data/loading/x.py", "from megatron_most.data.storage.documents import TASKS"),
        ("megatron_most/data/building/x.py", "from megatron_most.data import preparation, storage"),
        (
            "megatron_most/data/building/x.py",
            "from .tasks import make_document\nfrom megatron_most import vocab",
        ),
        ("megatron_most/data/x.py", "from megatron_most.data.loading.loader import train_batches"),
    ],
)
def test_an_import_of_a_lower_room_is_allowed(path, source):
    assert room_violations(source, Path(path)) == []
