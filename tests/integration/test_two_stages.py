"""examples/two_stages: what its steps are made of, and all of it with few samples, killed once."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf

from examples.two_stages import run
from megatron_most.config import load_config
from tests.integration.launching import environment, started, wait_for
from tests.pages import ROOT

SUITES = {
    ("asr", "heldout_s"),
    ("tts", "heldout_s"),
    ("swuggy", "lexical/dev"),
    ("sblimp", "syntactic/dev"),
    ("storycloze", "sSC"),
    ("storycloze", "tSC"),
    ("salmon", "salmon_benchmark"),
    ("sqa", "web_questions S-T"),
    ("sqa", "web_questions S-S"),
    ("text", "heldout_s"),
}
TASKS = {"asr": "asr", "tts": "tts", "refinedweb": "text", "smoltalk": "written", "smoltalk_spoken": "spoken"}
"""How the names of the recipes' datasets end -> what they teach; so do those of the example."""


def by_task(entries: dict[str, float]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for name, weight in entries.items():
        task = TASKS.get(name) or TASKS.get(name.rpartition("_")[2], name.rpartition("_")[2])
        shares[task] = round(shares.get(task, 0) + weight, 6)
    return shares


@pytest.mark.parametrize(("stage", "blend"), [(1, run.STAGE_1), (2, run.STAGE_2)])
def test_the_weights_are_those_of_the_large_recipes(stage: int, blend: dict[str, float]) -> None:
    recipe = OmegaConf.load(ROOT / f"examples/configs/most_16b_stage{stage}.yaml")
    weights = {Path(entry.path).name: entry.weight for entry in recipe.data.train}
    assert by_task(blend) == by_task(weights) and sum(blend.values()) == pytest.approx(1)


@pytest.mark.parametrize("size", [run.DEFAULT, run.QUICK])
def test_the_steps_name_files_that_exist_and_configurations_that_are_valid(size: run.Size, tmp_path: Path) -> None:
    steps = run.make_steps(tmp_path, size, ["seed=5"])
    for step in steps:
        named = [part for part in step.command if re.fullmatch(r"[\w/]+\.(py|yaml|nemo)", part)]
        assert all((ROOT / name).is_file() for name in [*named, *step.inputs]), step.name
    first, second = (step.command for step in steps if step.trains is not None)
    configs = [load_config(ROOT / run.CONFIG, part[part.index("--config") + 2 :]) for part in (first, second)]
    assert [config.checkpoint.load for config in configs] == [None, configs[0].run_dir]
    assert [config.training.train_iters for config in configs] == list(size.steps)
    assert {config.seed for config in configs} == {5}
    built = re.findall(rf"--output {tmp_path}/data/(\w+)(?= |$)", " ".join(steps[3].command))
    assert {*run.STAGE_1, *run.STAGE_2} <= set(built)


def test_what_it_takes_is_said_in_its_readme() -> None:
    steps = run.make_steps(Path("runs/two_stages"), run.DEFAULT, [])
    assert set(run.SECONDS) < {step.name for step in steps}
    assert round(sum(step.seconds for step in steps) / 60) == run.MINUTES
    readme = (ROOT / "examples/two_stages/README.md").read_text()
    assert f"about {run.MINUTES} minutes on two cores" in readme


def is_running(run_dir: Path) -> bool:
    """Whether a process names the folder: one that outlives the run that was killed."""
    for process in psutil.process_iter(["cmdline"]):
        if any(str(run_dir) in part for part in process.info["cmdline"] or ()):
            return True
    return False


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_quick_run_that_is_killed_resumes_and_judges_everything(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "killed.log"
    command = [sys.executable, str(ROOT / "examples/two_stages/run.py"), "--quick", "--run-dir", str(run_dir)]
    with log.open("w") as output, started(command, env=environment(), stdout=output, stderr=output) as process:
        done = run_dir / "steps" / "data.done"
        wait_for("the datasets", lambda: done.exists() or process.poll() is not None, seconds=900)
    assert done.exists(), log.read_text()[-6000:]
    wait_for("the end of what was killed", lambda: not is_running(run_dir))

    resumed = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stdout[-6000:] + resumed.stderr[-6000:]
    assert re.findall(r"^\[(\d+)/12\] .*: done already$", resumed.stdout, re.MULTILINE) == ["1", "2", "3", "4"]

    table = (run_dir / "table.md").read_text()
    assert table in resumed.stdout
    lines = {tuple(cells(line)[:2]): cells(line) for line in table.splitlines()[2:] if line.startswith("|")}
    assert lines.keys() == SUITES
    for suite, line in lines.items():
        assert int(line[2]) > 0 and line[3] == "0", suite
        assert all(re.match(r"\d+\.\d+$", score) for score in line[6:9]), suite
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary.keys() == {" ".join(suite) for suite in SUITES}
    same = re.search(r"export: (\d+) of (\d+) answers and likelihoods are those in", resumed.stdout)
    assert same is not None and int(same[1]) == int(same[2]) >= 2 * len(SUITES)
    assert (run_dir / "comparison.html").is_file()
