"""The runner of examples, and the quickstart: steps run once, and again when something they depend on changed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from examples import outlook as outlook_of
from examples import steps as steps_of
from megatron_most import checkpointing, cli
from megatron_most.errors import MostError

PATH = Path(__file__).parents[2] / "examples" / "quickstart" / "run.py"


@pytest.fixture(scope="module")
def run():
    spec = importlib.util.spec_from_file_location("quickstart_run", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def counting(tmp_path):
    """Steps ``first`` and ``second`` that leave a line in a file each time they run."""
    source = tmp_path / "input.txt"
    source.write_text("a")

    def steps(second_argument: str = "x"):
        script = "import sys; open(sys.argv[1], 'a').write(sys.argv[2] + '\\n')"
        command = [sys.executable, "-c", script, str(tmp_path / "ran.txt")]
        return [
            steps_of.Step("first", "first step", [*command, "first"], [source]),
            steps_of.Step("second", "second step", [*command, f"second {second_argument}"]),
        ]

    def ran() -> list[str]:
        lines = (tmp_path / "ran.txt").read_text().splitlines()
        (tmp_path / "ran.txt").write_text("")
        return lines

    return source, steps, ran


def test_complete_steps_are_skipped(counting, tmp_path):
    _, steps, ran = counting
    steps_of.run_steps(steps(), tmp_path, "the work")
    assert ran() == ["first", "second x"]
    steps_of.run_steps(steps(), tmp_path, "the work")
    assert ran() == []


def test_a_changed_command_runs_again_without_those_before_it(counting, tmp_path):
    _, steps, ran = counting
    steps_of.run_steps(steps(), tmp_path, "the work")
    ran()
    steps_of.run_steps(steps("y"), tmp_path, "the work")
    assert ran() == ["second y"]


def test_a_changed_input_runs_everything_after_it_again(counting, tmp_path):
    source, steps, ran = counting
    steps_of.run_steps(steps(), tmp_path, "the work")
    ran()
    source.write_text("b")
    steps_of.run_steps(steps(), tmp_path, "the work")
    assert ran() == ["first", "second x"]


def test_a_failed_step_stops_the_run_and_is_tried_again(counting, tmp_path):
    _, steps, ran = counting
    failing = steps()
    failing[0].command = [sys.executable, "-c", "raise SystemExit(3)"]
    with pytest.raises(MostError, match="step first failed with status 3"):
        steps_of.run_steps(failing, tmp_path, "the work")
    assert not (tmp_path / "ran.txt").exists()
    steps_of.run_steps(steps(), tmp_path, "the work")
    assert ran() == ["first", "second x"]


@pytest.fixture
def training(tmp_path):
    """Makes a step that leaves a checkpoint, then ends with the status in the file ``status``, or 0."""
    script = (
        "import pathlib, sys; run_dir = pathlib.Path(sys.argv[1]);"
        "(run_dir / 'checkpoints' / 'step_1').mkdir(parents=True, exist_ok=True);"
        "open(run_dir / 'ran.txt', 'a').write(sys.argv[2] + '\\n');"
        "sys.exit(int((run_dir / 'status').read_text()) if (run_dir / 'status').exists() else 0)"
    )

    def make(configuration: str):
        command = [sys.executable, "-c", script, str(tmp_path), configuration]
        return [steps_of.Step("train", "train", command, trains=tmp_path)]

    return make


def test_the_work_of_another_configuration_is_refused_and_not_stamped(training, tmp_path):
    steps_of.run_steps(training("first"), tmp_path, "the work")
    for _ in range(2):
        with pytest.raises(MostError, match=f"^{tmp_path} was trained with another configuration or other data: "):
            steps_of.run_steps(training("second"), tmp_path, "the work")
    steps_of.run_steps(training("first"), tmp_path, "the work")  # is complete as before
    assert (tmp_path / "ran.txt").read_text() == "first\n"


def test_an_interrupted_training_continues_but_not_with_another_configuration(training, tmp_path):
    (tmp_path / "status").write_text("1")
    with pytest.raises(MostError, match="step train failed"):
        steps_of.run_steps(training("first"), tmp_path, "the work")
    (tmp_path / "status").unlink()
    with pytest.raises(MostError, match="another configuration"):
        steps_of.run_steps(training("second"), tmp_path, "the work")
    steps_of.run_steps(training("first"), tmp_path, "the work")
    assert (tmp_path / "ran.txt").read_text() == "first\n" * 2


def test_training_that_was_asked_to_stop_continues(training, tmp_path, monkeypatch):
    (step,) = training("first")
    (tmp_path / "status").write_text(str(cli.STOPPED))
    step.training_steps = 100
    monkeypatch.setattr(checkpointing, "read_metadata", lambda path: SimpleNamespace(step=40))
    with pytest.raises(MostError, match="train was stopped after step 40 of 100; run again to continue"):
        steps_of.run_steps([step], tmp_path, "the work")
    (tmp_path / "status").unlink()
    monkeypatch.setattr(checkpointing, "read_metadata", lambda path: SimpleNamespace(step=100))
    steps_of.run_steps([step], tmp_path, "the work")
    steps_of.run_steps([step], tmp_path, "the work")  # is complete
    assert (tmp_path / "ran.txt").read_text() == "first\n" * 2


def test_without_a_checkpoint_another_configuration_may_start(training, tmp_path):
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "train.started").write_text("another identity")
    (tmp_path / "checkpoints").mkdir()
    steps_of.run_steps(training("second"), tmp_path, "the work")
    assert (tmp_path / "ran.txt").read_text() == "second\n"


def test_the_layout_of_the_data_is_that_of_the_configuration(run, tmp_path):
    overrides = ["vocab.text_vocab_size=460", "vocab.codebook_size=900", f"run_dir={tmp_path}"]
    commands = {step.name: " ".join(step.command) for step in run.make_steps(tmp_path, overrides)}
    assert "--vocab-size 460" in commands["tokenizer"]
    assert "--text-vocab-size 460" in commands["train_asr"]
    assert "--num-codebooks 4 --codebook-size 900" in commands["train_text"]


def test_the_steps_name_files_that_exist(run):
    root = PATH.parents[2]
    for step in run.make_steps(Path("runs/quickstart"), []):
        scripts = [part for part in step.command if part.endswith(".py")]
        assert scripts, step.name
        for path in [*scripts, *step.inputs]:
            assert (root / path).is_file(), f"{step.name}: {path}"


def test_what_it_takes_is_said_once_on_the_console_and_in_the_readme(run, counting, tmp_path, capsys):
    steps = run.make_steps(Path("runs/quickstart"), [])
    assert set(run.SECONDS) < {step.name for step in steps}
    assert round(sum(step.seconds for step in steps) / 60) == run.MINUTES
    readme = (PATH.parents[2] / "README.md").read_text()
    assert f"It takes about {run.MINUTES} minutes on two cores" in " ".join(readme.split())
    _, short, _ = counting
    steps_of.run_steps(short(), tmp_path, "the work")
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "2 of 2 steps to do: less than a minute on two cores"
    assert out[3].startswith("[1/2] first step: ") and out[3].endswith(" s, less than a minute left")
    assert out[-1].startswith("[2/2] second step: ") and out[-1].endswith(" s")


def test_the_time_left_follows_the_pace_of_this_machine():
    outlook = outlook_of.Outlook(600.0)
    assert outlook.left() == outlook.left(100.0, 0.0) == 600
    assert outlook.left(100.0, 10.0) == 590  # too early to judge the pace
    outlook.end(100.0, 200.0)  # half as fast as expected
    assert outlook.left() == 1000
    assert outlook.left(300.0, 60.0) == pytest.approx(940)
    assert outlook.left(300.0, 1000.0) > 200  # a step that takes longer than it should is not over
    assert outlook.left(300.0, 300.0, fraction=0.25) == pytest.approx(500 / 175 * 425)  # and is getting slower
    assert [outlook_of.about(seconds) for seconds in (20, 61, 640)] == [
        "less than a minute",
        "about 1 minute",
        "about 11 minutes",
    ]


def test_a_long_step_says_how_long_all_of_it_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("examples.outlook.SOON", 0.2)
    script = "import sys, time; time.sleep(1); open(sys.argv[1], 'w').write(sys.argv[2]); time.sleep(1)"
    lines = "".join(json.dumps(line) + "\n" for line in ({"step": 30}, {"validation": 1, "step": 60}))
    command = [sys.executable, "-c", script, str(tmp_path / "metrics.jsonl"), lines]
    monkeypatch.setattr(checkpointing, "read_metadata", lambda path: SimpleNamespace(step=100))
    steps = [steps_of.Step("long", "train", command, trains=tmp_path, training_steps=100, takes=600)]
    steps_of.run_steps(steps, tmp_path, "the work")
    said = [line.strip() for line in capsys.readouterr().out.splitlines() if "left of the work" in line]
    assert said[0] == "about 10 minutes left of the work"
    assert said[-1] == "less than a minute left of the work"  # 60 of 100 steps in two seconds
    # Continued, it is expected to take 40 percent of its time.
    (tmp_path / "steps" / "long.done").unlink()
    steps_of.run_steps(steps, tmp_path, "the work")
    assert "1 of 1 steps to do: about 4 minutes on two cores" in capsys.readouterr().out


def test_ctrl_c_is_one_line_after_the_step_has_ended(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"""import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("quickstart_run", {str(PATH)!r})
run = sys.modules["quickstart_run"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)
assert "torch" not in sys.modules
step = run.Step("long", "wait", [sys.executable, "-c", "import argparse, pathlib, sys, time;"
    "from megatron_most import cli; work = lambda _: (pathlib.Path(sys.argv[1], 'started').touch(), time.sleep(60));"
    "cli.run(argparse.ArgumentParser(), work, [])", sys.argv[1]])
run.cli.run(run.argparse.ArgumentParser(), lambda _: run.run_steps([step], pathlib.Path(sys.argv[1]), "the work"), [])
"""
    )
    command = [sys.executable, str(script), str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, text=True, start_new_session=True)
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted: step long stops; run again to continue\n")
    assert out.splitlines()[-1].startswith("    python -c")
    assert not (tmp_path / "steps" / "long.done").exists()
