"""Turns of written conversations -> speech, by any program that speaks.

A synthesizer is a command line of one of two kinds:

* with ``{output}`` in it, it is run for every turn: it reads the text on its standard input and writes an audio file of
  that name, for example ``espeak-ng -v {voice} -w {output}``;
* without, it is started once in each worker, for programs that take long to load: it reads JSON lines
  ``{"text", "output", "role", "voice"}`` and answers each, once the file is written, with a line ``{}``, or
  ``{"error": reason}``.

Audio files are named after text, voice and command, so a second run reuses them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import soundfile

from megatron_most.data.preparation.chat_files import MAX_FAILED, Chat, Message, read_chats
from megatron_most.data.preparation.keyed_choice import choose
from megatron_most.errors import ConfigError, DataError
from megatron_most.files import replacing, require_writable

TIMEOUT = 300
"""Seconds one turn may take."""

_UNSPEAKABLE = ("```", "|---")
"""Marks of code and tables, which are not read aloud."""


@dataclass(frozen=True)
class _Job:
    """One turn to speak; :attr:`path` depends on text, voice and synthesizer."""

    id: str
    message: Message
    voice: str
    path: Path


def speak_chats(
    chat_file: str | Path,
    output: str | Path,
    synthesizer: str,
    *,
    roles: Sequence[str] = ("user", "assistant"),
    voices: Sequence[str] = (),
    max_characters: int = 600,
    workers: int | None = None,
    max_failed: float = MAX_FAILED,
) -> Counter[str]:
    """Speak the turns of ``roles`` and write ``<output>/{audio/,manifest.jsonl,chats.jsonl,failed.jsonl}``.

    ``manifest.jsonl`` is what ``tokenize`` reads, ``chats.jsonl`` the conversations with the ids of their utterances,
    which ``build --task chat`` reads, ``failed.jsonl`` the turns that stay written because the synthesizer failed, with
    its reason. Longer turns than ``max_characters``, and those with code or tables, stay written too.

    Args:
        voices: what ``{voice}`` may be; one side of a conversation keeps its voice.
        workers: turns spoken at a time; None takes the number of cores.

    Returns:
        Counts of turns: ``spoken``, ``written``, ``failed``.

    Raises:
        ConfigError: no such command.
        DataError: a broken chat file, or a larger share of the turns failed than ``max_failed``.
    """
    output = Path(output)
    command = _check_command(synthesizer, voices)
    require_writable(output / "manifest.jsonl")

    def jobs(chats: Iterable[Chat]) -> Iterator[_Job]:
        for chat in chats:
            for place, message in enumerate(chat.messages()):
                speakable = not any(mark in message.content for mark in _UNSPEAKABLE)
                if message.role in roles and len(message.content) <= max_characters and speakable:
                    voice = choose(voices, "voice", chat.id, message.role) if voices else ""
                    name = hashlib.blake2b("\0".join((synthesizer, voice, message.content)).encode(), digest_size=16)
                    path = output / "audio" / name.hexdigest()[:2] / f"{name.hexdigest()}.wav"
                    yield _Job(f"{chat.id}#{place}", message, voice, path)

    failed = _speak_all(jobs(read_chats(chat_file)), command, workers or len(os.sched_getaffinity(0)), max_failed)
    spoken_of = ((chat, {job.id: job for job in jobs([chat]) if _is_sound(job.path)}) for chat in read_chats(chat_file))
    return _write_results(output, spoken_of, failed)


def _write_results(
    output: Path, spoken_of: Iterable[tuple[Chat, dict[str, _Job]]], failed: dict[str, str]
) -> Counter[str]:
    """Write the manifest, the conversations and the failures; counts of turns.

    Args:
        spoken_of: each conversation, with the turns that are spoken by their ids.
        failed: reasons by the ids of turns.
    """
    counts: Counter[str] = Counter(spoken=0, written=0, failed=len(failed))
    with (
        replacing(output / "manifest.jsonl") as manifest_path,
        replacing(output / "chats.jsonl") as chats_path,
        replacing(output / "failed.jsonl") as failed_path,
    ):
        with open(manifest_path, "w", encoding="utf-8") as manifest, open(chats_path, "w", encoding="utf-8") as chats:
            for chat, spoken in spoken_of:
                for job in spoken.values():
                    _write_line(manifest, _manifest_entry(job, output, chat.license))
                messages = [
                    {"role": message.role, "content": message.content}
                    | ({"audio": f"{chat.id}#{place}"} if f"{chat.id}#{place}" in spoken else {})
                    for place, message in enumerate(chat.messages())
                ]
                license = {"license": chat.license} if chat.license else {}
                _write_line(chats, {"id": chat.id, **license, "messages": messages})
                counts["spoken"] += len(spoken)
                counts["written"] += len(messages) - len(spoken)
        with open(failed_path, "w", encoding="utf-8") as file:
            for identity, reason in failed.items():
                _write_line(file, {"id": identity, "reason": reason})
    return counts


def _manifest_entry(job: _Job, output: Path, license: str | None) -> dict:
    entry = {
        "id": job.id,
        "audio_filepath": str(job.path.relative_to(output)),
        "duration": soundfile.info(job.path).duration,
        "text": job.message.content,
    }
    more = {"speaker": job.voice or None, "license": license}
    return entry | {name: value for name, value in more.items() if value is not None}


def _write_line(file, entry: dict) -> None:
    file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _check_command(synthesizer: str, voices: Sequence[str]) -> list[str]:
    try:
        command = shlex.split(synthesizer)
    except ValueError as error:
        raise ConfigError(f"synthesizer={synthesizer!r}: {error}") from None
    if not command or shutil.which(command[0]) is None:
        raise ConfigError(f"synthesizer={synthesizer!r}: there is no such command")
    if "{voice}" in synthesizer and not voices:
        raise ConfigError(f"synthesizer={synthesizer!r}: {{voice}} needs voices")
    return command


def _speak_all(jobs: Iterable[_Job], command: list[str], workers: int, max_failed: float) -> dict[str, str]:
    """Speak the turns that have no audio yet; returns the reason of each failure by the turn's id."""
    failed: dict[str, str] = {}
    seen: set[Path] = set()
    total = 0
    servers = _Servers(command) if not any("{output}" in part for part in command) else None
    speak = servers.speak if servers else lambda job, path: _run(command, job, path)
    running: dict[Future[None], _Job] = {}

    def collect(finished: Iterable[Future[None]]) -> None:
        for future in finished:
            job = running.pop(future)
            if error := future.exception():
                if not isinstance(error, DataError):
                    raise error
                failed[job.id] = str(error)
        if len(failed) > max_failed * total and (total >= 100 or not running):
            identity, reason = next(iter(failed.items()))
            raise DataError(
                f"speechify: {len(failed)} of {total} turns failed, more than {max_failed:.2%} (--max-failed);"
                f" the first, {identity}: {reason}"
            )

    with ThreadPoolExecutor(workers) as executor:
        try:
            for job in jobs:
                total += 1
                if job.path in seen or _is_sound(job.path):
                    continue
                seen.add(job.path)
                running[executor.submit(_speak, speak, job)] = job
                if len(running) >= 4 * workers:
                    collect(wait(running, return_when=FIRST_COMPLETED).done)
            collect(list(wait(running).done))
        finally:
            executor.shutdown(cancel_futures=True)
            if servers:
                servers.close()
    return failed


def _is_sound(path: Path) -> bool:
    """Whether the file is readable audio. A file left incomplete by a crash or a full disk is not."""
    try:
        return path.is_file() and soundfile.info(path).frames > 0
    except soundfile.LibsndfileError:
        return False


def _speak(speak, job: _Job) -> None:
    """Speak one turn to a temporary file; rename it once it is readable audio."""
    job.path.parent.mkdir(parents=True, exist_ok=True)
    temporary = job.path.with_name(f".{job.path.stem}.{os.getpid()}.wav")
    try:
        speak(job, temporary)
        try:
            frames = soundfile.info(temporary).frames
        except soundfile.LibsndfileError:
            raise DataError("the synthesizer wrote no readable audio") from None
        if not frames:
            raise DataError("the synthesizer wrote no sound")
        os.replace(temporary, job.path)
    finally:
        temporary.unlink(missing_ok=True)


def _run(command: list[str], job: _Job, path: Path) -> None:
    filled = [
        part.replace("{output}", str(path)).replace("{voice}", job.voice).replace("{role}", job.message.role)
        for part in command
    ]
    try:
        done = subprocess.run(
            filled, input=job.message.content, capture_output=True, text=True, errors="replace", timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        raise DataError(f"the synthesizer took more than {TIMEOUT} s") from None
    except OSError as error:
        raise DataError(f"the synthesizer does not start: {error.strerror}") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(f"the synthesizer ended with status {done.returncode}: {last}")


class _Servers:
    """One synthesizer process per thread."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._local = threading.local()
        self._processes: list[subprocess.Popen[str]] = []

    def speak(self, job: _Job, path: Path) -> None:
        process = getattr(self._local, "process", None)
        if process is None or process.poll() is not None:
            process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self._local.process = process
            self._processes.append(process)
        assert process.stdin is not None and process.stdout is not None, "both are pipes"
        request = {
            "text": job.message.content, "output": str(path), "role": job.message.role, "voice": job.voice,
        }  # fmt: skip
        timer = threading.Timer(TIMEOUT, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline() or "null")
        except (OSError, ValueError):
            answer = None
        finally:
            timer.cancel()
        if not isinstance(answer, dict):
            process.kill()
            raise DataError("the synthesizer ended, or answered with no JSON object")
        if answer.get("error"):
            raise DataError(str(answer["error"]))

    def close(self) -> None:
        for process in self._processes:
            assert process.stdin is not None and process.stdout is not None, "both are pipes"
            process.stdin.close()
            process.stdout.close()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
