"""What README and documents point at exists, and the file tree of CONTRIBUTING.md names every package."""

import re

import pytest
from omegaconf import OmegaConf

from megatron_most.config.load import build_config
from tests.pages import ROOT, code_blocks

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])


def tree_paths(document: str) -> list[str]:
    """Paths of the file tree: the code block after the heading "The files", two spaces a level."""
    block = document.split("## The files")[1].split("```")[1]
    paths, folders = [], [""]
    for line in filter(None, block.splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders[depth + 1 :] = [folders[depth] + name]
        paths.append(folders[depth + 1])
    return paths


def test_the_file_tree_names_only_what_exists():
    paths = tree_paths((ROOT / "CONTRIBUTING.md").read_text())
    assert len(paths) > 20
    missing = [path for path in paths if not (ROOT / path).exists() or path.endswith("/") != (ROOT / path).is_dir()]
    assert not missing


def test_the_file_tree_names_every_package_and_module_of_the_top():
    paths = tree_paths((ROOT / "CONTRIBUTING.md").read_text())
    package = ROOT / "megatron_most"
    packages = {f"megatron_most/{path.parent.name}/" for path in package.glob("*/__init__.py")}
    modules = {f"megatron_most/{path.name}" for path in package.glob("*.py") if path.name != "__init__.py"}
    assert packages | modules <= set(paths)


def configurations() -> list[tuple[str, str]]:
    """(place, text) of the examples of a configuration, whole or in part, that documents show; sweeps have axes."""
    blocks = [
        (f"{path.relative_to(ROOT)}-{index}", block)
        for path in DOCUMENTS
        for index, block in enumerate(block.text for block in code_blocks(path) if block.language == "yaml")
    ]
    return [(place, block) for place, block in blocks if "\naxes:" not in block]


@pytest.mark.parametrize(("place", "text"), configurations(), ids=lambda value: value.split("\n")[0])
def test_an_example_of_a_configuration_is_valid(place: str, text: str) -> None:
    """A part is laid over the configuration of the 16B model."""
    values = OmegaConf.create(text)
    if "run_dir" not in values:
        values = OmegaConf.merge(OmegaConf.load(ROOT / "examples/configs/most_16b_stage1.yaml"), values)
    build_config(place, values)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_a_document_lead_somewhere(document):
    targets = re.findall(r"\]\(([^)#\s]+)", document.read_text())
    missing = [target for target in targets if "://" not in target and not (document.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_and_configurations_that_a_document_names_exist(document):
    named = re.findall(r"(?:tools|examples|docs)/[\w/.-]+\.(?:py|yaml|md|nemo)", document.read_text())
    missing = sorted(name for name in set(named) if "NAME" not in name and not (ROOT / name).exists())
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_starts_ranks_in_one_way(document):
    """By ``most torchrun``; plain torchrun would end with another status, and with a traceback."""
    assert not re.findall(r"^ *torchrun .*", document.read_text(), re.MULTILINE)


def test_documents_that_the_code_names_exist():
    sources = [path for folder in ("megatron_most", "tools", "examples") for path in (ROOT / folder).rglob("*.py")]
    named = {name for path in sources for name in re.findall(r"docs/[\w-]+\.md", path.read_text())}
    assert named
    assert not sorted(name for name in named if not (ROOT / name).exists())
