"""``most``: one program for every command, help at once, and one parser for all the ways in."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_most import __version__, cli
from megatron_most.commands.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[3]
DOORS = {
    "tools/convert_checkpoint.py": "convert",
    "tools/doctor.py": "doctor",
    "tools/evaluate.py": "evaluate",
    "tools/generate.py": "generate",
    "tools/plan.py": "plan",
    "tools/prepare_data.py": "prepare",
    "tools/report.py": "report",
    "tools/sweep.py": "sweep",
    "examples/pretrain_most.py": "train",
}
NO_DOORS = {"tools/install_missing.py"}  # runs before anything is installed

ASK_FOR_HELP = """
import contextlib, io, json, runpy, sys
sys.argv = sys.argv[1:]
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
# What takes seconds to import; without it, help takes 0.2 to 0.7 s of CPU time.
loaded = {name.partition(".")[0] for name in sys.modules}
slow = {"torch", "megatron", "nemo", "scipy", "jinja2", "soundfile", "transformers", "submitit", "tqdm", "gradio"}
heavy = sorted(loaded & slow)
print(json.dumps({"out": out.getvalue(), "heavy": heavy}))
"""


def ask_for_help(module: str, *arguments: str) -> dict:
    command = [sys.executable, "-c", ASK_FOR_HELP, module, *arguments, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def every_command() -> list[tuple[str, ...]]:
    """Each command, and each subcommand of those that have any."""
    found: list[tuple[str, ...]] = []
    for name in COMMANDS:
        parser = importlib.import_module(f"megatron_most.commands.{name}").make_parser()
        found += [(name,), *((name, *more.prog.split()[2:]) for more in cli.subparsers(parser))]
    return found


@pytest.mark.parametrize("command", every_command(), ids=" ".join)
def test_help_comes_at_once_and_imports_nothing_heavy(command):
    name, *more = command
    answer = ask_for_help(f"megatron_most.commands.{name}", *more)
    assert answer["out"].startswith(f"usage: most {' '.join(command)} ")
    assert answer["heavy"] == []


def test_subcommands_are_among_them():
    assert {("prepare", "manifest"), ("convert", "import"), ("train",)} < set(every_command())


def test_the_quickstart_begins_without_torch():
    script = ASK_FOR_HELP.replace("runpy.run_module(sys.argv[0]", "runpy.run_path(sys.argv[0]")
    command = [sys.executable, "-c", script.replace(", alter_sys=True", ""), "examples/quickstart/run.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert "minutes on two cores" in " ".join(answer["out"].split()) and answer["heavy"] == []


def test_the_program_lists_its_commands():
    answer = ask_for_help("megatron_most.commands")
    assert answer["heavy"] == []
    assert all(f"  {name}" in answer["out"] and purpose in answer["out"] for name, purpose in COMMANDS.items())


def test_the_program_hands_over_to_a_command(capsys):
    with pytest.raises(SystemExit) as left:
        main(["report", "no_such_run"])
    assert left.value.code == 1
    assert capsys.readouterr().err == "error: no_such_run: no such run directory\n"


@pytest.mark.parametrize("arguments", [[], ["melt"], ["--melt"]])
def test_the_program_refuses_what_it_does_not_know(capsys, arguments):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("usage: most [-h] [--version] COMMAND ...")


def test_the_program_tells_its_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"most {__version__}\n"


def test_every_module_of_the_package_is_a_command_or_part_of_one():
    modules = {path.stem for path in (ROOT / "megatron_most" / "commands").glob("[!_]*.py")}
    assert modules - {"evaluate_suites", "model_options", "prepare_sources", "talking"} == set(COMMANDS)


def test_every_door_leads_to_its_command_and_parses_nothing():
    scripts = {str(path.relative_to(ROOT)) for path in (ROOT / "tools").glob("*.py")} | {"examples/pretrain_most.py"}
    assert scripts - NO_DOORS == set(DOORS)
    for script, command in DOORS.items():
        text = (ROOT / script).read_text()
        assert f"from megatron_most.commands.{command} import main" in text
        assert "argparse" not in text and len(text.splitlines()) <= 12
