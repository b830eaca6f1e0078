"""``most demo`` refuses what it cannot do before it loads a model."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_most import inference
from megatron_most.commands import demo
from megatron_most.errors import ConfigError
from megatron_most.inference import MissingCodec


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit):
        demo.main(["--checkpoint", "c", "--port", "0", *arguments])
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--port", "70000"), "--port=70000: must be from 0 to 65535"),
        (("--max-waiting", "0"), "--max-waiting=0: must be greater than 0"),
        (("--max-input-seconds", "nan"), "--max-input-seconds=nan: must be greater than 0"),
        (("--host", "203.0.113.7"), "--host=203.0.113.7 --port=0: cannot listen there: "),
        (("--top-p", "2"), "top_p=2.0: must be in (0, 1]"),
    ],
)
def test_a_value_out_of_range_is_one_line(capsys, monkeypatch, arguments, message) -> None:
    monkeypatch.setattr(demo, "require", lambda *modules: None)
    assert message in refused(capsys, *arguments)


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(capsys) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port={port}: cannot listen there: " in refused(capsys, "--port", str(port))


def test_a_page_needs_its_extra(capsys, monkeypatch) -> None:
    monkeypatch.setattr("megatron_most.extras.importlib.util.find_spec", lambda name: None)
    assert "needs gradio, which is not installed; the extra 'demo' brings it" in refused(capsys)


def test_loopback_is_the_default_and_is_known() -> None:
    assert demo.make_parser().parse_args(["--checkpoint", "c"]).host == "127.0.0.1"
    assert [demo.is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0")] == [
        True,
        True,
        True,
        False,
    ]


def test_a_checkpoint_without_a_codec_gets_a_page_of_text(capsys, monkeypatch) -> None:
    pytest.importorskip("gradio")
    loads: list[Any] = []

    def load(checkpoint: str, *parts: Any, needs_codec: bool = True) -> Any:
        loads.append(needs_codec)
        if needs_codec:
            raise MissingCodec(checkpoint)
        return SimpleNamespace()

    made: list[Any] = []
    monkeypatch.setattr(inference, "load_for_generation", load)
    monkeypatch.setattr("megatron_most.demo.card.card_of", lambda checkpoint, model: "card")
    monkeypatch.setattr("megatron_most.demo.host.tasks_of", lambda model, has_codec: ("chat",))
    monkeypatch.setattr("megatron_most.demo.page.Page", lambda host, *rest: made.append(host))
    arguments = demo.make_parser().parse_args(["--checkpoint", "runs/mine"])
    demo.build(arguments, None, None, Path("."))  # type: ignore[arg-type]
    assert loads == [True, False] and made[0].has_codec is False
    assert "note: runs/mine: has no codec; pass one with --codec, to hear" in capsys.readouterr().err
    arguments.tasks = ["asr"]
    with pytest.raises(ConfigError, match="--tasks: asr and tts need a codec"):
        demo.build(arguments, None, None, Path("."))  # type: ignore[arg-type]
    arguments.tasks = ["sing"]
    with pytest.raises(ConfigError, match="--tasks=sing: must be of asr, chat, continue, tts"):
        demo.build(arguments, None, None, Path("."))  # type: ignore[arg-type]
