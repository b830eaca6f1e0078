"""docs/tutorial.md: its commands run one after another, and what it says of their results is so."""

import json
import subprocess

import pytest

from tests.integration.launching import environment
from tests.pages import ROOT, code_blocks, joined_lines


def commands_and_files() -> list[tuple[str, str]]:
    """(kind, text) of the page's blocks, in order; a command is one line."""
    found = []
    for block in code_blocks("docs/tutorial.md"):
        lines = joined_lines(block.text) if block.language == "bash" else [block.text]
        found += [(block.language, line) for line in lines]
    return found


def test_the_page_shows_every_command_but_those_for_large_models():
    shown = {line.split()[1] for kind, line in commands_and_files() if line.startswith("most ")}
    assert shown >= {"doctor", "prepare", "train", "generate", "evaluate", "report"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tutorial_runs_as_it_is_written(tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for kind, text in commands_and_files():
        if kind == "yaml":
            (tmp_path / "tutorial/config.yaml").write_text(text)
            continue
        done = subprocess.run(text, shell=True, cwd=tmp_path, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    run = tmp_path / "tutorial/run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert max(losses) == 80 and losses[80] < losses[1]
    assert (run / "report.html").is_file() and (tmp_path / "tutorial/spoken.wav").stat().st_size > 0
    assert "wer" in (tmp_path / "tutorial/asr.json").read_text()
