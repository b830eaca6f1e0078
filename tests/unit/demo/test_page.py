"""The handlers behind the page's buttons, without a browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from megatron_most.demo.host import TASKS, Exchange, Limits
from megatron_most.errors import ConfigError, DataError
from megatron_most.inference import Decoding, Sampling

if TYPE_CHECKING:
    from megatron_most.demo.page import Page

pytest.importorskip("gradio")
soundfile = pytest.importorskip("soundfile")
VISITOR = SimpleNamespace(session_hash="anna")


class FakeHost:
    """Speaks two chunks, or raises what it is told to."""

    limits, has_codec = Limits(), True
    model = SimpleNamespace(codec=SimpleNamespace(sample_rate=8000))

    def __init__(self, tasks: tuple[str, ...] = tuple(TASKS)) -> None:
        self.tasks, self.error, self.asked, self.forgotten = tasks, None, [], []

    def answer(self, visitor: str, request: Any, decoding: Decoding) -> Iterator[Exchange]:
        self.asked.append((visitor, request, decoding))
        exchange = Exchange(request.text, request.recording, 8000)
        if isinstance(self.error, DataError):
            raise self.error
        yield exchange
        for level in (0.1, 0.2):
            exchange.add(np.full(800, level))
            yield exchange
        if self.error:
            raise self.error
        exchange.notes.append("<b>so & so</b>")
        exchange.is_over, exchange.new_sound = True, None
        yield exchange

    def forget(self, visitor: str) -> None:
        self.forgotten.append(visitor)


@pytest.fixture
def page(tmp_path: Path) -> Page:
    from megatron_most.demo.page import Page

    return Page(FakeHost(), "mine", "# card", Decoding(9, 2.0, Sampling(0.5, 4, 0.9, 7, 1.1)), tmp_path)  # type: ignore[arg-type]


def given(page: Page, **changed: Any) -> dict[Any, Any]:
    """The values of the inputs as they stand on the page, but for what is ``changed``."""
    [function] = [one for one in page.blocks.fns.values() if one.fn is not None and one.fn.__name__ == "ask"]
    values = {component: getattr(component, "value", None) for component in function.inputs}
    return values | {getattr(page, name): value for name, value in changed.items()}


def test_an_answer_clears_the_input_and_brings_chunks_then_a_file(page: Page) -> None:
    steps = list(page.ask(given(page, task="tts", text="good day"), VISITOR))
    assert steps[0][page.text] == "" and page.text not in steps[1]
    players = [step[page.player] for step in steps]
    assert [len(player["chunks"]) for player in players] == [0, 1, 2, 2]
    assert len({player["id"] for player in players}) == 1 and players[1]["rate"] == 8000
    user, assistant = steps[-1][page.chat]
    assert user["content"] == ["good day"] and steps[-1][page.history] == steps[-1][page.chat]
    assert soundfile.info(assistant["content"][0]["path"]).frames == 1600
    assert "&lt;b&gt;so &amp; so" in steps[-1][page.notice]
    [(visitor, request, decoding)] = page.host.asked  # type: ignore[attr-defined]
    assert (visitor, request.task, request.recording) == ("anna", "tts", None)
    assert decoding == Decoding(256, 20.0, Sampling(0.5, 4, 0.9, 7, 1.1))


def test_what_is_hidden_is_not_sent(page: Page) -> None:
    for task, recording in (("asr", "a.wav"), ("tts", "a.wav"), ("continue", None)):
        list(page.ask(given(page, task=task, text="t", recording=recording, form="spoken", system="s"), VISITOR))
    requests = [request for _, request, _ in page.host.asked]  # type: ignore[attr-defined]
    assert [request.text for request in requests] == ["", "t", "t"]
    assert [request.recording for request in requests] == [Path("a.wav"), None, None]
    assert [request.form for request in requests] == ["written", "written", "spoken"]
    assert [request.system for request in requests] == [""] * 3


def test_a_refusal_is_a_line_and_leaves_input_and_history(page: Page) -> None:
    page.host.error = DataError("the text: has 3 <b>")  # type: ignore[attr-defined]
    history = [{"role": "user", "content": ["a"]}]
    [step] = page.ask(given(page, text="x", history=history), VISITOR)
    assert "the text: has 3 &lt;b&gt;" in step[page.notice] and step[page.chat] == history
    assert page.text not in step


def test_what_turns_out_not_to_fit_comes_back_to_be_changed(page: Page) -> None:
    page.host.error = ConfigError("a prompt of 90 positions")  # type: ignore[attr-defined]
    first, *_, last = page.ask(given(page, text="x"), VISITOR)
    assert first[page.text] == "" and last[page.text] == "x" and last[page.chat] == []


def test_a_failure_is_a_line_and_what_was_said_until_then_stays(page: Page, caplog: pytest.LogCaptureFixture) -> None:
    page.host.error = RuntimeError("out of memory at 0x7f")  # type: ignore[attr-defined]
    step = list(page.ask(given(page, text="x"), VISITOR))[-1]
    assert "failed on the server" in step[page.notice] and "0x7f" not in step[page.notice]
    assert "out of memory at 0x7f" in caplog.text
    assert step[page.chat][1]["content"] == ["stopped while speaking … 0.2 s"]


def test_stop_and_a_new_conversation_silence_the_player(page: Page) -> None:
    messages, _, player = page.after_stop([{"role": "assistant", "content": ["…"]}])
    assert messages[0]["content"] == ["stopped"] and player["chunks"] == []
    assert page.start_over(VISITOR)[:3] == ([], [], "")
    page.leave(VISITOR)
    assert page.host.forgotten == ["anna", "anna"]  # type: ignore[attr-defined]


def test_a_task_shows_what_it_needs(page: Page) -> None:
    shown = {task: [one["visible"] for one in page.show_task(task)[1:]] for task in TASKS}
    assert shown == {  # form, system message, text, recording
        "chat": [True, True, True, True],
        "asr": [False, False, False, True],
        "tts": [False, False, True, False],
        "continue": [True, False, True, True],
    }


def test_no_function_can_be_called_but_by_the_page_and_one_answer_is_made_at_a_time(page: Page) -> None:
    functions = [one for one in page.blocks.fns.values() if one.fn is not None]
    assert {one.api_visibility for one in functions if one.fn.__name__ != "leave"} == {"private"}
    [ask] = [one for one in functions if one.fn.__name__ == "ask"]
    assert ask.concurrency_limit == 1
    assert page.blocks.analytics_enabled is False


def test_the_page_asks_no_other_host(page: Page) -> None:
    from megatron_most.demo.page import css, theme

    assert "http" not in css() and "googleapis" not in theme()._get_theme_css()
