"""What pyproject.toml declares is what the code imports, and a missing package is told in one line."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from megatron_most import extras
from megatron_most.extras import EXTRAS, MissingExtra, require

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORTED_AS = {"nemo-toolkit": "nemo", "pyyaml": "yaml", "megatron-core": "megatron", "piper-tts": "piper"}
"""Distributions that are imported by another name than their own."""
NOT_IMPORTED = {"psutil", "triton", "tensorboard"}
"""Required by what Megatron and torch import of them."""
NOT_DECLARED = {"wandb", "resemblyzer", "speechmos"}
"""A run names it by logging.wandb_project, an evaluation by --scorer, and is told to install it."""


def distribution(requirement: str) -> str:
    name = re.match(r"[\w.-]+", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def module(requirement: str) -> str:
    name = distribution(requirement)
    return IMPORTED_AS.get(name, name.replace("-", "_"))


def declared(extra: str) -> set[str]:
    """Modules of an extra, with those of the extras that it names."""
    found: set[str] = set()
    for requirement in PROJECT["optional-dependencies"][extra]:
        if distribution(requirement) == PROJECT["name"]:
            for other in re.findall(r"[\w-]+", requirement.partition("[")[2]):
                found |= declared(other)
        else:
            found.add(module(requirement))
    return found


def imported(folder: str) -> set[str]:
    """Top-level modules that a folder's files import, at any depth."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"megatron_most"}


def test_every_package_that_is_imported_is_declared_and_none_else():
    required = {module(requirement) for requirement in PROJECT["dependencies"]}
    optional = set().union(*map(declared, set(EXTRAS)))
    found = imported("megatron_most")
    assert found - NOT_DECLARED <= required | optional
    assert required - NOT_IMPORTED <= found


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_brings_the_modules_that_are_looked_for(extra):
    assert set(EXTRAS[extra]) <= declared(extra)
    elsewhere = set().union(*(modules for name, modules in EXTRAS.items() if name != extra))
    assert declared(extra) <= set(EXTRAS[extra]) | elsewhere


def test_all_brings_everything_but_what_only_a_gpu_can_use_the_harness_and_real_weights():
    assert declared("all") == set().union(*map(declared, set(EXTRAS) - {"gpu", "harness", "studio"}))
    assert declared("dev") >= declared("all") | declared("harness") | declared("studio")


def test_training_requires_nothing_of_an_extra():
    required = {module(requirement) for requirement in PROJECT["dependencies"]}
    assert not required & set().union(*EXTRAS.values())


def test_the_installed_metadata_is_that_of_the_project():
    """An editable installation keeps the metadata of the day it was made."""
    if importlib.metadata.metadata("megatron-most").get_all("Provides-Extra") != list(PROJECT["optional-dependencies"]):
        pytest.skip("megatron-most was installed before its extras changed: pip install -e . again")
    entry = next(iter(importlib.metadata.entry_points(group="console_scripts", name="most")))
    assert entry.load().__module__ == "megatron_most.commands.__main__"


def test_a_missing_package_is_named_with_the_extra_of_the_command(monkeypatch):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra) as caught:
        require("jiwer")
    assert str(caught.value) == (
        "needs jiwer, which is not installed; the extra 'evaluation' brings it: pip install 'megatron-most[evaluation]'"
    )
    assert "most report: needs jiwer" in str(MissingExtra("jiwer", "most report"))
    assert "megatron-most[report]" in str(MissingExtra("jiwer", "most report"))


HIDE = """
import runpy, sys
from importlib.machinery import PathFinder
hidden = set(sys.argv.pop(1).split(","))
class Filter(PathFinder):  # in the place of the finder that goes through sys.path
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else PathFinder.find_spec(name, path, target)
    @classmethod
    def find_distributions(cls, *context):
        found = PathFinder.find_distributions(*context)
        return (one for one in found if one.name.lower().replace("-", "_") not in hidden)
sys.meta_path[sys.meta_path.index(PathFinder)] = Filter
sys.argv[0:2] = [sys.argv[1]]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
"""Arguments: modules to hide, separated by commas; the module to run; its arguments."""

# torch and Megatron themselves import jinja2 and transformers where these are there.
ALL_HIDDEN = ",".join(sorted(set().union(*EXTRAS.values()) - {"jinja2"}))


def run_without(hidden: str, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    parts = [sys.executable, "-W", "ignore", "-c", HIDE, hidden, f"megatron_most.commands.{command}", *arguments]
    return subprocess.run(parts, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def files(tmp_path) -> str:
    (tmp_path / "m.jsonl").write_text('{"audio_filepath": "a.wav", "text": "a"}\n')
    chat = '{"id": "1", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    (tmp_path / "chat.jsonl").write_text(chat)
    return str(tmp_path)


EVALUATE = ("evaluate", "--checkpoint", "c", "--suite", "asr", "--data", "{tmp}/m.jsonl", "--output", "{tmp}/o.json")
MISSING = [
    (("report", "{tmp}"), "jinja2", "report"),
    (("report", "{tmp}"), "jiwer", "report"),
    (("sweep", "--spec", "examples/sweeps/toy_routing.yaml", "--collect"), "scipy", "sweep"),
    (EVALUATE, "jiwer", "evaluation"),
    (EVALUATE, "whisper_normalizer", "evaluation"),
    ((*EVALUATE[:4], "tts", *EVALUATE[5:]), "pocketsphinx", "evaluation"),
    (("generate", "--checkpoint", "c", "--task", "asr", "--input", "a.wav"), "soundfile", "audio"),
    (("demo", "--checkpoint", "c", "--port", "0"), "gradio", "demo"),
    (("prepare", "tokenize", "--manifest", "{tmp}/m.jsonl", "--codec", "c", "--output", "{tmp}/c"), "nemo", "audio"),
    (("prepare", "tokenize", "--manifest", "{tmp}/m.jsonl", "--codec", "c", "--output", "{tmp}/c"), "soxr", "audio"),
    (
        ("prepare", "speechify", "--chat", "{tmp}/chat.jsonl", "--synthesizer", "cp {output}", "--output", "{tmp}/s"),
        "soundfile",
        "audio",
    ),
    (("convert", "import", "--hf", "h", "--out", "{tmp}/o"), "safetensors", "conversion"),
    (("convert", "export", "--checkpoint", "c", "--format", "most", "--out", "{tmp}/o"), "safetensors", "conversion"),
    (("convert", "verify", "--hf", "h", "--checkpoint", "c"), "transformers", "conversion"),
    (("harness", "--checkpoint", "c", "--tasks", "arc_easy", "--output", "{tmp}/o.json"), "lm_eval", "harness"),
]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("arguments", "hidden", "extra"), MISSING, ids=lambda value: value if value else "")
def test_a_command_whose_extra_is_missing_says_so_in_one_line(files, arguments, hidden, extra):
    done = run_without(hidden, *(argument.replace("{tmp}", files) for argument in arguments))
    assert done.returncode == 1
    assert done.stderr == (
        f"error: most {arguments[0]}: needs {hidden}, which is not installed; the extra {extra!r} brings it:"
        f" pip install 'megatron-most[{extra}]'\n"
    )
    assert done.stdout == ""


def test_every_command_that_needs_an_extra_is_tested_without_it():
    from megatron_most.commands.__main__ import COMMANDS

    assert {arguments[0] for arguments, *_ in MISSING} == set(COMMANDS) - {
        "compare",
        "doctor",
        "launch",
        "plan",
        "torchrun",
        "train",
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "arguments",
    [
        ("doctor",),
        ("launch",),
        (
            "plan",
            "--config",
            "examples/configs/most_16b_stage1.yaml",
            "--gpus",
            "64",
            "--limit",
            "1",
            "--no-check-files",
        ),
        ("train", "--config", "examples/configs/most_debug.yaml", "--dry-run", "--no-check-files"),
        ("prepare", "--help"),
        ("evaluate", "--help"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_needs_no_extra_works_without_any(arguments):
    done = run_without(ALL_HIDDEN, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_training_works_without_any_extra(tmp_path):
    from megatron_most.config import dump_config
    from tests.integration.tiny_run import run_config

    (tmp_path / "run.yaml").write_text(dump_config(run_config(tmp_path)))
    done = run_without(ALL_HIDDEN, "train", "--config", str(tmp_path / "run.yaml"))
    assert done.returncode == 0, done.stderr
    assert "finished 6 steps" in done.stdout
