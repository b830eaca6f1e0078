"""What every command shares: one-line errors, the traceback on request, and the exit status."""

import argparse
import subprocess
import sys

import pytest

from megatron_most import cli
from megatron_most.errors import ConfigError, DataError


def raise_data_error(arguments):
    raise DataError(f"{arguments.path}:\n  line 3 is\tno JSON")


@pytest.fixture
def run(monkeypatch):
    def run(command, *argv):
        parser = argparse.ArgumentParser(prog="tool")
        parser.add_argument("path")
        monkeypatch.setattr("sys.argv", ["tool", *argv])
        cli.run(parser, command)

    return run


def test_a_command_that_works_returns(run):
    seen = []
    run(seen.append, "a.jsonl")
    assert seen[0].path == "a.jsonl"


def test_an_error_is_one_line_and_status_1(run, capsys):
    with pytest.raises(SystemExit) as left:
        run(raise_data_error, "a.jsonl")
    assert left.value.code == 1
    assert capsys.readouterr().err == "error: a.jsonl: line 3 is no JSON\n"


def test_debug_shows_where_the_error_came_from(run):
    with pytest.raises(DataError):
        run(raise_data_error, "a.jsonl", "--debug")


def test_an_error_of_the_program_keeps_its_traceback(run):
    def broken(arguments):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(broken, "a.jsonl")


def test_an_optional_package_that_is_missing_is_one_line(run, capsys):
    def broken(arguments):
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    with pytest.raises(SystemExit) as left:
        run(broken, "a.jsonl")
    assert left.value.code == 1
    assert capsys.readouterr().err == (
        "error: tool: needs scipy, which is not installed; the extra 'sweep' brings it: pip install"
        " 'megatron-most[sweep]'\n"
    )
    with pytest.raises(ModuleNotFoundError):
        run(broken, "a.jsonl", "--debug")


def test_a_module_that_no_extra_brings_keeps_its_traceback(run):
    def broken(arguments):
        raise ModuleNotFoundError("No module named 'megatron_most.melt'", name="megatron_most.melt")

    with pytest.raises(ModuleNotFoundError):
        run(broken, "a.jsonl")


def test_an_interrupt_is_no_traceback(run, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as left:
        run(interrupted, "a.jsonl")
    assert left.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_wrong_usage_is_status_2(run, capsys):
    with pytest.raises(SystemExit) as left:
        run(raise_data_error)
    assert left.value.code == 2
    assert "usage: tool" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [("--debug", "build", "a.jsonl"), ("build", "a.jsonl", "--debug"), ("build", "a.jsonl")]
)
def test_debug_may_stand_before_or_after_a_subcommand(monkeypatch, argv):
    parser = argparse.ArgumentParser(prog="tool")
    parser.add_subparsers(required=True).add_parser("build").add_argument("path")
    monkeypatch.setattr("sys.argv", ["tool", *argv])
    with pytest.raises(DataError if "--debug" in argv else SystemExit):
        cli.run(parser, raise_data_error)


def test_options_may_stand_between_positional_arguments(monkeypatch):
    seen = []
    for argv in (["a=1", "--config", "c", "b=2"], ["--config", "c", "a=1", "b=2"], ["--config", "c"]):
        parser = argparse.ArgumentParser(prog="tool")
        parser.add_argument("--config", required=True)
        parser.add_argument("overrides", nargs="*")
        monkeypatch.setattr("sys.argv", ["tool", *argv])
        cli.run(parser, seen.append)
    assert [(arguments.config, arguments.overrides) for arguments in seen] == [
        ("c", ["a=1", "b=2"]),
        ("c", ["a=1", "b=2"]),
        ("c", []),
    ]


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_options_that_must_be_positive_are_named(value):
    cli.require_positive(argparse.Namespace(workers=None, max_seconds=0.5), "workers", "max_seconds")
    with pytest.raises(ConfigError, match=f"^--max-seconds={value}: must be greater than 0"):
        cli.require_positive(argparse.Namespace(workers=1, max_seconds=value), "workers", "max_seconds")


def test_a_reader_that_has_enough_is_no_error():
    """``tool | head -1``: no traceback, and the status of a process that SIGPIPE ends."""
    script = "import argparse; from megatron_most import cli;"
    script += "cli.run(argparse.ArgumentParser(), lambda arguments: [print('x' * 1000) for _ in range(1000)])"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == b""


@pytest.mark.parametrize("text", ["two", "-1", "0", "1.5", "", "9" * 5000, "\u0663"])
def test_a_world_size_that_is_no_number_is_one_line(monkeypatch, text):
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=.*: must be an integer of at least 1"):
        cli.launcher_integer("WORLD_SIZE", 1, least=1)


def test_the_launcher_names_ranks(monkeypatch):
    monkeypatch.setenv("RANK", "12")
    assert cli.launcher_integer("RANK", 0) == 12
    monkeypatch.delenv("RANK")
    assert cli.launcher_integer("RANK", 0) == 0
