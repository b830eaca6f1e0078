"""Progress of long work: what a log shows, what a terminal shows, and when."""

import sys

import pytest
import tqdm.std

from megatron_most.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds, which the test sets."""
    now = [1000.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_few_seconds_with_speed_and_time_left(clock, capsys):
    progress = Progress("tokenize", 50, " files", initial=10)
    clock[0] += 1
    progress.add(1, "0.01 h of audio")  # too early for another line
    clock[0] += 19
    progress.add(7, "2.00 h of audio")
    clock[0] += 80
    progress.add(32, "9.00 h of audio")
    progress.close()
    assert capsys.readouterr().err.splitlines() == [
        "tokenize: 10/50 files, ? files/s, ? left",
        "tokenize: 18/50 files, 2.00 h of audio, 0.40 files/s, 01:20 left",
        "tokenize: 50/50 files, 9.00 h of audio, 0.40 files/s, 00:00 left",
        "tokenize: 50/50 files, 9.00 h of audio, 0.40 files/s in 01:40",
    ]


def test_bytes_have_their_units(clock, capsys):
    progress = Progress("import", 3_200_000_000, "B")
    clock[0] += 2
    progress.add(3_200_000_000)
    progress.close()
    assert capsys.readouterr().err.splitlines()[-1] == "import: 3.20G/3.20GB, 1.60GB/s in 00:02"


def test_a_terminal_gets_one_line_that_is_rewritten(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = Progress("import", 4, " files")
    clock[0] += 2
    progress.add(1)
    progress.close()
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "\r" in shown
    assert "import:  25%|" in shown and "1/4 files,  0.50 files/s [00:02<00:06]" in shown


def test_work_that_fails_leaves_no_last_line(clock, capsys):
    with pytest.raises(ZeroDivisionError), Progress("import", 4, " files") as progress:
        clock[0] += 1
        progress.add(1)
        raise ZeroDivisionError
    assert capsys.readouterr().err.splitlines() == ["import: 0/4 files, ? files/s, ? left"]


def test_ranks_that_show_nothing_show_nothing(capsys):
    progress = Progress("import", 4, " files", enabled=False)
    progress.add(4)
    progress.close()
    assert capsys.readouterr() == ("", "")
