"""What is written about a run, and that a resumed run's files hold each step once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron_most.config import ExpertGroupConfig, LoggingConfig, MoEConfig
from megatron_most.errors import ConfigError
from megatron_most.training.metrics import (
    JsonLines,
    MetricAccumulator,
    MetricsWriter,
    console_line,
    require_installed,
)
from tests.unit.training.test_routing_metrics import layer

NAMES = ["loss", "loss/text", "loss/audio", "tokens"]
MOE = MoEConfig(groups=[ExpertGroupConfig("text", 2, 1), ExpertGroupConfig("audio", 2, 1)])


def test_means_divide_sums_over_steps_and_leave_out_what_had_no_target() -> None:
    accumulator = MetricAccumulator(NAMES, MOE)
    accumulator.add([[6.0, 2.0], [6.0, 2.0], [0.0, 0.0], [10.0, 1.0]])
    accumulator.add([[4.0, 8.0], [4.0, 8.0], [0.0, 0.0], [20.0, 1.0]])
    assert accumulator.means() == {"loss": 1.0, "loss/text": 1.0}
    assert accumulator.tokens == 30
    accumulator.reset()
    assert accumulator.means() == {}


def test_a_step_that_is_not_finite_counts_only_its_tokens() -> None:
    accumulator = MetricAccumulator(NAMES, MOE)
    accumulator.add([[6.0, 2.0], [6.0, 2.0], [0.0, 0.0], [10.0, 1.0]])
    accumulator.routing.add([layer(2, text=[1, 3, 0, 0], audio=[0, 0, 0, 4])])
    accumulator.add([[float("nan"), 8.0], [4.0, 8.0], [0.0, 0.0], [20.0, 1.0]], is_finite=False)
    assert accumulator.means() == {"loss": 3.0, "loss/text": 3.0}
    assert accumulator.tokens == 30
    assert accumulator.routing.layers() == []


def test_state_survives_json_exactly() -> None:
    accumulator = MetricAccumulator(NAMES, MOE)
    accumulator.add([[0.1, 3.0], [1 / 3, 3.0], [0.0, 0.0], [7.0, 1.0]])
    accumulator.routing.add([layer(2, text=[1, 3, 0, 0], audio=[0, 0, 0, 4], balance_loss=1 / 7)])
    restored = MetricAccumulator([*NAMES, "loss/new"], MOE)
    restored.load_state(json.loads(json.dumps(accumulator.state())))
    assert restored.means() == accumulator.means()
    assert restored.routing.layers() == accumulator.routing.layers()
    assert restored.tokens == 7


def test_json_lines_drop_later_and_torn_lines_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 5, "loss": 2.0}\n{"step": 6, "loss": 1.0}\n{"step": 7, "lo')
    lines = JsonLines(path, resume_step=5)
    lines.write({"step": 6, "loss": 1.5})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 5, 6]
    lines.close()


@pytest.mark.parametrize("damage", [b"\xb0", b"{", b'{"loss": 1}', b'{"step": "1"}', b"3", b"[" * 100_000])
def test_a_damaged_line_is_dropped_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture, damage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    JsonLines(path, resume_step=5).close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 3}\n'
    assert f"warning: {path}: dropped 1 damaged lines" in capsys.readouterr().out


def test_a_full_disk_is_one_line_and_leaves_nothing_to_write(tmp_path: Path) -> None:
    """A buffer that could not be written would raise once more, without a name, when the file is closed."""
    lines = JsonLines(tmp_path / "metrics.jsonl", 0)
    lines.write({"step": 1})
    lines.close()
    lines.stream = open("/dev/full", "ab", buffering=0)  # noqa: SIM115 - closed by lines
    with pytest.raises(ConfigError, match="metrics.jsonl: cannot be read or written: No space left on device"):
        lines.write({"step": 2})
    lines.close()


def test_json_lines_refuse_what_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        JsonLines(tmp_path / "metrics.jsonl", 0).write({"step": 1, "loss": float("nan")})


VALUES = {
    "step": 50,
    "time": 0.0,
    "loss": 2.0,
    "loss/text": 1.0,
    "loss/audio": 3.0,
    "grad_norm": 0.5,
    "lr": 1e-3,
    "tokens_per_second": 12345.0,
    "step_seconds": 2.0,
}


def test_console_line_says_what_people_ask_for() -> None:
    line = console_line(VALUES, 2000, ("text", "audio", "image"))
    for part in ("50/2000", "loss 2.0000", "text 1.0000", "audio 3.0000", "1.00e-03", "12,345 tok/s", "1h05m left"):
        assert part in line


def test_console_line_of_skipped_steps() -> None:
    values = {name: value for name, value in VALUES.items() if not name.startswith("loss") and name != "grad_norm"}
    assert "loss - ()  grad -  lr" in console_line(values, 2000, ("text", "audio"))


def test_writer_writes_lines_tensorboard_and_console(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    writer = MetricsWriter(tmp_path, LoggingConfig(tensorboard=True), 100, 0, ("text", "audio"), {})
    writer.training(VALUES, [{"layer": 2, "pairs": {"text": [1], "audio": [2]}}])
    writer.validation(50, {"validation/heldout/loss": 1.5, "validation/heldout/loss/text": 1.25})
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written[0] == VALUES
    assert written[1]["validation/heldout/loss/text"] == 1.25
    routing = json.loads((tmp_path / "routing.jsonl").read_text())
    assert routing == {"step": 50, "layers": [{"layer": 2, "pairs": {"text": [1], "audio": [2]}}]}
    assert list((tmp_path / "tensorboard").iterdir())
    assert "heldout 1.5000" in capsys.readouterr().out
    writer.close()


def test_a_missing_tracker_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    require_installed(LoggingConfig(tensorboard=False))
    with pytest.raises(ConfigError, match="logging.wandb_project='most': wandb is not installed"):
        require_installed(LoggingConfig(tensorboard=False, wandb_project="most"))
    with pytest.raises(ConfigError, match="logging.tensorboard=True: tensorboard is not installed"):
        require_installed(LoggingConfig(tensorboard=True))
