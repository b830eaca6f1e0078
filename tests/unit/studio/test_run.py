"""The studio's steps, for every preset."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.studio import run
from megatron_most.errors import MostError

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("preset", run.PRESETS)
def test_the_steps_name_files_that_exist_and_train_to_the_end(preset):
    steps = run.make_steps(Path("runs/studio"), run.PRESETS[preset], ["training.train_iters=300"])
    for step in steps:
        for path in [*(part for part in step.command if part.endswith(".py")), *step.inputs]:
            assert (ROOT / path).is_file(), f"{step.name}: {path}"
    assert [step.training_steps for step in steps if step.trains] == [300]
    assert set(run.PRESETS[preset].expected) <= {step.name for step in steps}


def test_it_can_end_early_and_only_at_a_step():
    steps = run.make_steps(Path("runs/studio"), run.PRESETS["cpu"], [])
    assert [step.name for step in run.until(steps, "check")] == ["text", "speech", "codec", "check"]
    assert run.until(steps, None) == steps
    with pytest.raises(MostError, match="--until=code: must be one of text, speech, codec"):
        run.until(steps, "code")


def test_a_codec_that_is_ready_is_checked_and_used():
    steps = run.make_steps(Path("runs/studio"), run.PRESETS["cpu"], [], Path("ready.nemo"))
    commands = {step.name: step.command for step in steps}
    assert "codec" not in commands
    assert all("ready.nemo" in commands[name] for name in ("check", "codes_train"))
    assert "codec=ready.nemo" in commands["train"]


def test_only_a_smoke_run_goes_on_with_any_codec():
    assert [name for name, preset in run.PRESETS.items() if set(run.NO_BOUNDS) & set(preset.check)] == ["smoke"]
