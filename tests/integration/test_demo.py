"""``most demo`` in headless Chromium: a recording is uploaded, and text and sound come back.

Needs the extra ``demo``, ``pip install playwright`` and Chromium (Debian: ``apt-get install chromium``; or its path in
``MOST_CHROMIUM``). With ``MOST_SCREENSHOTS`` set to a folder, the page is kept there as a picture.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from tests.integration.test_commands import ROOT
from tests.integration.test_generation_commands import workplace  # noqa: F401  # a fixture

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

CHROMIUM = os.environ.get("MOST_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(500),
    pytest.mark.skipif(
        CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium, or MOST_CHROMIUM"
    ),
]
MOST_WAIT = 40_000
"""Milliseconds that an answer may take on a busy machine."""
SPOKEN = re.compile(r"/answer_\d+\.wav")
"""The file of an answer, which the page fetches to show and to play."""


@pytest.fixture(scope="module")
def address(workplace: Path) -> Iterator[str]:  # noqa: F811
    """Of a page that serves a checkpoint of three steps."""
    options = ["--checkpoint", workplace / "run", "--port", 0, "--tasks", "chat", "asr", "tts", "continue"]
    limits = ["--max-new-tokens", 12, "--max-seconds", 1, "--max-input-seconds", 2, "--max-upload-mib", 1]
    command = [sys.executable, "-m", "megatron_most.commands.demo", *map(str, [*options, *limits])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=workplace, env=environment) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        found = next((match for line in lines if (match := re.search(r"the page is at (http\S+)", line))), None)
        assert found, "the page did not come up"
        yield found[1]
        process.terminate()
        assert process.wait(60) == 0


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    with playwright.sync_playwright() as tools:
        flags = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(viewport={"width": 1280, "height": 980})
        page.set_default_timeout(MOST_WAIT)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.wait_for_selector("#send")
        yield page
        foreign = [url for url in asked if not url.startswith((address.rstrip("/"), "data:", "blob:"))]
        assert not foreign, "the page asks another host"
        browser.close()


def choose(page: Any, task: str) -> None:
    page.locator(f'#task input[value="{task}"]').check()
    time.sleep(1)  # what the task needs is shown


def send(page: Any) -> None:
    page.locator("#send").click()


def answered_aloud(page: Any) -> bytes:
    """Send what is on the page; the WAV file of the answer."""
    with page.expect_response(SPOKEN) as reply:
        send(page)
    file = page.request.get(reply.value.url)
    assert file.ok
    return file.body()


def upload(page: Any, path: Path) -> None:
    page.locator("#recording").get_by_label("Upload file").click()
    with page.expect_response(re.compile("/upload")) as reply:
        page.locator('#recording input[type="file"]').set_input_files(str(path))
    assert reply.value.ok
    time.sleep(1)  # what was uploaded becomes the input


def keep(page: Any, name: str) -> None:
    if folder := os.environ.get("MOST_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


def test_a_recording_that_is_uploaded_becomes_text(page: Any, workplace: Path) -> None:  # noqa: F811
    choose(page, "asr")
    upload(page, workplace / "wav" / "0.wav")
    send(page)
    page.wait_for_function("document.querySelectorAll('#chat .bot').length > 0")
    page.wait_for_function("!/^…?$/.test([...document.querySelectorAll('#chat .bot')].pop().innerText.trim())")
    keep(page, "asr")


def test_a_text_becomes_sound_that_plays_as_it_comes_and_stays(page: Any) -> None:
    choose(page, "tts")
    page.locator("#text textarea").fill("the red fox")
    wav = answered_aloud(page)
    seconds = (len(wav) - 44) / 2 / 16000
    received = page.evaluate("Number(document.querySelector('#player [data-seconds]').dataset.seconds)")
    assert wav[:4] == b"RIFF" and 0 < seconds <= 1.0
    assert abs(received - seconds) < 0.01, "all that was played is in the file"
    assert page.locator("#text textarea").input_value() == ""
    keep(page, "tts")


def test_a_spoken_turn_is_answered_aloud_and_the_model_remembers(page: Any, workplace: Path) -> None:  # noqa: F811
    choose(page, "chat")
    page.locator('#form input[value="spoken"]').check()
    upload(page, workplace / "wav" / "1.wav")
    assert answered_aloud(page)[:4] == b"RIFF"
    page.locator('#form input[value="written"]').check()
    page.locator("#text textarea").fill("and now?")
    send(page)
    page.wait_for_function("document.querySelectorAll('#chat .user').length >= 2")
    keep(page, "chat")
    page.locator("#clear").click()
    page.wait_for_function("document.querySelectorAll('#chat .bot').length == 0")


@pytest.mark.parametrize(("what", "message"), [("long", "is longer than 2 s"), ("picture", "not readable as audio")])
def test_a_bad_recording_is_a_line_on_the_page_which_goes_on(
    page: Any,
    workplace: Path,  # noqa: F811
    tmp_path: Path,
    what: str,
    message: str,
) -> None:
    path = tmp_path / f"{what}.wav"
    if what == "long":
        soundfile.write(path, np.zeros(16000 * 3), 16000)
    else:
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(500))
    choose(page, "asr")
    upload(page, path)
    send(page)
    page.locator("#notice .refused").wait_for()
    assert message in page.locator("#notice .refused").inner_text()
    keep(page, f"refused-{what}")
    choose(page, "tts")
    page.locator("#text textarea").fill("the fox")
    assert answered_aloud(page)[:4] == b"RIFF"


def test_an_upload_that_is_too_large_is_refused(address: str, page: Any, tmp_path: Path) -> None:
    path = tmp_path / "huge.wav"
    soundfile.write(path, np.zeros(16000 * 60), 16000)
    choose(page, "asr")
    page.locator("#recording").get_by_label("Upload file").click()
    page.locator('#recording input[type="file"]').set_input_files(str(path))
    page.get_by_text(re.compile("maximum", re.IGNORECASE)).first.wait_for()
    keep(page, "refused-huge")
