"""What every command shares: one-line errors, the traceback on request, and the exit status."""

import argparse

import pytest

from megatron_most import cli
from megatron_most.errors import DataError


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
