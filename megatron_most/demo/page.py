"""The page: what is on it, and which function answers which button. Gradio is imported here alone.

Sound comes twice: chunk by chunk to the player, which plays it at once, and whole in the chat. Gradio's own streaming
would need ffmpeg.
"""

from __future__ import annotations

import html
import itertools
import logging
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from megatron_most.audio import write_wav
from megatron_most.demo.host import TASKS, Host, Request
from megatron_most.demo.messages import Message, kept, messages_of, pcm, stopped
from megatron_most.errors import MostError
from megatron_most.inference import FORMS, Decoding, Sampling

_ASSETS = Path(__file__).parent / "assets"
_FORMS = dict(zip(("in writing", "aloud", "as the model likes"), FORMS, strict=True))
_HINTS = {
    "chat": "Write or record a turn. The model answers, and remembers the conversation.",
    "asr": "Record or upload speech. The model writes down what it hears.",
    "tts": "Write a text. The model reads it aloud.",
    "continue": "Write or record a beginning, or both. The model goes on.",
}
_FONTS = ["system-ui", "sans-serif"]
"""The system's: no request to another host."""
_LIFETIME = 3600
"""Seconds that uploads and answers are kept."""


def theme() -> gr.themes.Base:
    return gr.themes.Soft(
        primary_hue="blue", secondary_hue="orange", font=_FONTS, font_mono=["ui-monospace", "monospace"]
    )


def css() -> str:
    return (_ASSETS / "page.css").read_text(encoding="utf-8")


class Page:
    """The components, and what happens at each button.

    Args:
        name: of the model.
        card: Markdown about it.
        start: the settings that the page begins with.
        folder: where sound is written.
    """

    def __init__(self, host: Host, name: str, card: str, start: Decoding, folder: Path) -> None:
        self.host, self._folder, self._numbers = host, folder, itertools.count()
        tasks = host.tasks
        with gr.Blocks(
            title=f"MoST: {name}", analytics_enabled=False, delete_cache=(_LIFETIME // 6, _LIFETIME)
        ) as self.blocks:
            gr.HTML(f"<h1>Talk to <em>{html.escape(name)}</em></h1>", elem_id="head")
            with gr.Row(equal_height=False):
                with gr.Column(scale=3, min_width=420):
                    self._build_talk(tasks[0])
                    with gr.Accordion("Which model this is", open=False, elem_id="card"):
                        gr.Markdown(card, container=False)
                with gr.Column(scale=1, min_width=300):
                    self._build_settings(tasks, start)
            self._connect()
        self.blocks.queue(max_size=host.limits.waiting, default_concurrency_limit=1)

    def _build_talk(self, task: str) -> None:
        limits = self.host.limits
        self.hint = gr.Markdown(_HINTS[task], elem_id="hint")
        self.chat = gr.Chatbot(
            height=440,
            show_label=False,
            render_markdown=False,
            buttons=["copy"],
            elem_id="chat",
            placeholder="Nothing was said yet.",
        )
        self.history = gr.State([])
        self.notice = gr.HTML(elem_id="notice")
        self.player = gr.HTML(
            {}, html_template="", js_on_load=(_ASSETS / "player.js").read_text(encoding="utf-8"), elem_id="player"
        )
        with gr.Row(equal_height=True):
            self.recording = gr.Audio(
                type="filepath",
                sources=["microphone", "upload"],
                label=f"Speech, at most {limits.seconds:g} s",
                visible=self.host.has_codec and task != "tts",
                editable=False,
                buttons=[],
                scale=2,
                min_width=240,
                elem_id="recording",
            )
            self.text = gr.Textbox(
                label=f"Text, at most {limits.characters} characters",
                placeholder="Write here; Shift+Enter begins a line",
                max_length=limits.characters,
                visible=task != "asr",
                lines=4,
                max_lines=8,
                submit_btn=False,
                scale=3,
                min_width=240,
                elem_id="text",
            )
        with gr.Row():
            self.send = gr.Button("Send", variant="primary", elem_id="send")
            self.stop = gr.Button("Stop", variant="stop", elem_id="stop")
            self.clear = gr.Button("New conversation", elem_id="clear")

    def _build_settings(self, tasks: tuple[str, ...], start: Decoding) -> None:
        limits, sampling = self.host.limits, start.sampling
        speaks = self.host.has_codec
        self.task = gr.Radio([(TASKS[task], task) for task in tasks], value=tasks[0], label="Task", elem_id="task")
        self.form = gr.Radio(
            list(_FORMS.items()), value="written", label="Answer", visible=self._has_form(tasks[0]), elem_id="form"
        )
        self.system = gr.Textbox(
            label="System message", max_length=limits.characters, visible=tasks[0] == "chat", elem_id="system"
        )
        self.plays = gr.Checkbox(True, label="Play speech as it comes", visible=speaks)
        self.transcribes = gr.Checkbox(
            "asr" in tasks,
            label="Let the model write down what is spoken",
            visible=speaks and "asr" in tasks and len(tasks) > 1,
        )
        with gr.Accordion("Sampling and limits", open=True):
            self.temperature = gr.Slider(
                0, max(2, sampling.temperature), value=sampling.temperature, step=0.05, label="Temperature (0: greedy)"
            )
            self.top_k = gr.Slider(0, max(200, sampling.top_k), value=sampling.top_k, step=1, label="Top-k (0: all)")
            self.top_p = gr.Slider(0.01, 1, value=sampling.top_p, step=0.01, label="Top-p")
            self.penalty = gr.Slider(
                1,
                max(2, sampling.repetition_penalty),
                value=sampling.repetition_penalty,
                step=0.05,
                label="Repetition penalty of text",
            )
            self.max_new = gr.Slider(1, limits.max_new, value=limits.max_new, step=1, label="Max new tokens")
            self.max_seconds = gr.Slider(
                0.5, limits.max_seconds, value=limits.max_seconds, step=0.5, label="Max seconds", visible=speaks
            )
            self.seed = gr.Number(sampling.seed, precision=0, minimum=0, maximum=2**31 - 1, label="Seed")

    def _connect(self) -> None:
        inputs: set[Any] = {
            *(self.task, self.form, self.system, self.plays, self.transcribes, self.text, self.recording),
            *(self.temperature, self.top_k, self.top_p, self.penalty, self.max_new, self.max_seconds, self.seed),
            self.history,
        }
        outputs = [self.chat, self.history, self.notice, self.player, self.text, self.recording]
        asked = gr.on(
            [self.send.click, self.text.submit],
            self.ask,
            inputs,
            outputs,
            concurrency_id="model",
            concurrency_limit=1,
            show_progress="minimal",
            show_progress_on=self.notice,
            api_visibility="private",
        )
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        self.stop.click(
            self.after_stop, [self.history], [self.chat, self.history, self.player], cancels=[asked], **quick
        )
        shown = [self.chat, self.history, self.notice, self.player]
        gr.on([self.clear.click, self.chat.clear], self.start_over, None, shown, cancels=[asked], **quick)
        self.task.change(
            self.show_task,
            [self.task],
            [self.hint, self.form, self.system, self.text, self.recording],
            **quick,
        )
        self.blocks.unload(self.leave)

    def ask(self, given: dict[Any, Any], request: gr.Request) -> Iterator[dict[Any, Any]]:
        """Answer the visitor: messages, sound and notes as they come; one line if that is refused or fails."""
        before: list[Message] = kept(given[self.history])
        sound: dict[str, Any] = {"id": secrets.token_hex(8), "plays": bool(given[self.plays]), "chunks": []}
        messages = before
        clears: dict[Any, Any] = {self.text: "", self.recording: None}
        try:
            asked, decoding = self._request(given), self._decoding(given)
            for exchange in self.host.answer(request.session_hash or "", asked, decoding):
                messages = [*before, *messages_of(exchange, self._save)]
                if exchange.new_sound is not None:
                    sound["rate"] = exchange.sample_rate
                    sound["chunks"] = [*sound["chunks"], pcm(exchange.new_sound)]
                yield {
                    self.chat: messages,
                    self.history: messages,
                    self.notice: _notice(exchange.notes, "note"),
                    self.player: {**sound},  # Gradio sends what has changed since the last one
                    **clears,
                }
                clears = {}
        except MostError as error:
            # As if it had not been sent, to be changed and sent again.
            inputs = {} if clears else {one: given[one] for one in (self.text, self.recording)}
            yield {self.chat: before, self.history: before, self.notice: _notice([str(error)], "refused"), **inputs}
        except Exception:
            logging.getLogger(__name__).exception("a request failed")
            line = "The answer failed on the server; its log says why."
            kept_of_it = stopped(messages)
            yield {self.chat: kept_of_it, self.history: kept_of_it, self.notice: _notice([line], "refused")}

    def after_stop(self, history: list[Message]) -> tuple[Any, ...]:
        messages = stopped(history)
        return messages, messages, {"id": secrets.token_hex(8), "chunks": []}

    def start_over(self, request: gr.Request) -> tuple[Any, ...]:
        self.host.forget(request.session_hash or "")
        return [], [], "", {"id": secrets.token_hex(8), "chunks": []}

    def leave(self, request: gr.Request) -> None:
        self.host.forget(request.session_hash or "")

    def show_task(self, task: str) -> tuple[Any, ...]:
        """Only what the task needs."""
        return (
            _HINTS[task],
            gr.update(visible=self._has_form(task)),
            gr.update(visible=task == "chat"),
            gr.update(visible=task != "asr"),
            gr.update(visible=self.host.has_codec and task != "tts"),
        )

    def _has_form(self, task: str) -> bool:
        return self.host.has_codec and task in ("chat", "continue")

    def _request(self, given: dict[Any, Any]) -> Request:
        """What is hidden does not count."""
        task, recording = given[self.task], given[self.recording]
        return Request(
            task,
            text="" if task == "asr" else given[self.text] or "",
            recording=None if recording is None or task == "tts" else Path(recording),
            form=given[self.form] if self._has_form(task) else "written",
            system=given[self.system] or "" if task == "chat" else "",
            transcribes=bool(given[self.transcribes]),
        )

    def _decoding(self, given: dict[Any, Any]) -> Decoding:
        sampling = Sampling(
            float(given[self.temperature]),
            int(given[self.top_k]),
            float(given[self.top_p]),
            int(given[self.seed] or 0),
            float(given[self.penalty]),
        )
        return Decoding(int(given[self.max_new]), float(given[self.max_seconds]), sampling)

    def _save(self, waveform: np.ndarray) -> str:
        for old in self._folder.glob("answer_*.wav"):
            if time.time() - old.stat().st_mtime > _LIFETIME:
                old.unlink()
        path = self._folder / f"answer_{next(self._numbers)}.wav"
        write_wav(path, waveform, self.host.model.codec.sample_rate)
        return str(path)


def _notice(lines: list[str], kind: str) -> str:
    text = " ".join(map(html.escape, lines))
    return f'<div class="{kind}" role="alert">{text}</div>' if text else ""


def launch(page: Page, host: str, port: int) -> str:
    """Serve the page from threads of this process; returns its address."""
    _, url, _ = page.blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        show_error=False,
        max_file_size=page.host.limits.upload_mib << 20,
        state_session_capacity=page.host.limits.visitors,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        theme=theme(),
        css=css(),
    )
    return url
