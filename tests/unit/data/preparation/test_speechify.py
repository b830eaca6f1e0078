"""Turns become speech by any program; what fails stays written, and nothing is spoken twice."""

import json
import sys
from pathlib import Path

import pytest
import soundfile

from megatron_most.data.preparation.chat_files import read_chats
from megatron_most.data.preparation.manifest import read_manifest
from megatron_most.data.preparation.speechify import speak_chats
from megatron_most.errors import ConfigError, DataError

SPEAK = """
import json, sys, wave

def speak(text, path):
    if "fail" in text:
        raise SystemExit("cannot say this")
    with wave.open(path, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(b"ab" * 80 * len(text))
"""
ONE = SPEAK + "speak(sys.stdin.read(), sys.argv[1]); open(sys.argv[2], 'a').write('x')"
SERVER = (
    SPEAK
    + """
open(sys.argv[1], 'a').write('x')
for line in sys.stdin:
    job = json.loads(line)
    try:
        speak(job["text"], job["output"])
        print("{}", flush=True)
    except SystemExit as error:
        print(json.dumps({"error": str(error)}), flush=True)
"""
)


def write_chats(folder: Path, num_chats: int, *answers: str) -> Path:
    chats = [
        {
            "id": f"c/{n}",
            "messages": [
                {"role": "system", "content": "be kind"},
                {"role": "user", "content": f"question {n}"},
                {"role": "assistant", "content": answers[n % len(answers)]},
            ],
        }
        for n in range(num_chats)
    ]
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return path


def command(folder: Path, program: str, output: bool) -> str:
    path = folder / "synthesizer.py"
    path.write_text(program)
    return f"{sys.executable} -I {path} {'{output}' if output else ''} {folder / 'calls'}"


@pytest.mark.parametrize(("program", "output"), [(ONE, True), (SERVER, False)])
def test_turns_become_audio_a_manifest_and_conversations(tmp_path, program, output):
    chats = write_chats(tmp_path, 6, "a long answer", "```code```", "the same")
    run = command(tmp_path, program, output)
    counts = speak_chats(chats, tmp_path / "out", run, max_characters=20, workers=2)
    assert counts == {"spoken": 10, "written": 8, "failed": 0}  # 6 system turns and 2 of code stay written
    records = {record.id: record for record in read_manifest(tmp_path / "out/manifest.jsonl")}
    assert records["c/3#1"].text == "question 3" and records["c/0#2"].audio == records["c/3#2"].audio
    for record in records.values():
        assert soundfile.info(record.audio).frames == 80 * len(record.text)
        assert record.duration == len(record.text) / 100
    written = [json.loads(line) for line in (tmp_path / "out/chats.jsonl").read_text().splitlines()]
    spoken = [message.get("audio") for chat in written for message in chat["messages"]]
    assert set(spoken) - {None} == set(records) and spoken[0] is None
    calls = len((tmp_path / "calls").read_text())
    assert calls == (8 if output else 2) or (not output and calls == 1)
    before = (tmp_path / "out/manifest.jsonl").read_bytes()
    speak_chats(chats, tmp_path / "out", run, max_characters=20, workers=1)
    assert len((tmp_path / "calls").read_text()) == calls and (tmp_path / "out/manifest.jsonl").read_bytes() == before


def test_the_license_of_a_conversation_goes_with_its_speech(tmp_path):
    chats = write_chats(tmp_path, 1, "fine")
    chats.write_text(chats.read_text().replace('{"id"', '{"license": "CC0", "id"'))
    speak_chats(chats, tmp_path / "out", command(tmp_path, ONE, True), workers=1)
    assert {record.license for record in read_manifest(tmp_path / "out/manifest.jsonl")} == {"CC0"}
    assert [chat.license for chat in read_chats(tmp_path / "out/chats.jsonl")] == ["CC0"]


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    chats = write_chats(tmp_path, 4, "one", "two")
    run = command(tmp_path, ONE, True)
    speak_chats(chats, tmp_path / "out", run, workers=1)
    audio = sorted((tmp_path / "out/audio").rglob("*.wav"))
    expected = {path: path.read_bytes() for path in audio}
    audio[0].write_bytes(b"")  # what a crash of the machine may leave
    (tmp_path / "out/manifest.jsonl").unlink()
    (tmp_path / "calls").unlink()
    speak_chats(chats, tmp_path / "out", run, workers=1)
    assert (tmp_path / "calls").read_text() == "x"
    assert {path: path.read_bytes() for path in (tmp_path / "out/audio").rglob("*.*")} == expected


@pytest.mark.parametrize(("program", "output"), [(ONE, True), (SERVER, False)])
def test_a_turn_that_fails_stays_written_with_its_reason(tmp_path, program, output):
    chats = write_chats(tmp_path, 12, *["fine"] * 11, "fail")
    counts = speak_chats(chats, tmp_path / "out", command(tmp_path, program, output), workers=2)
    assert counts == {"spoken": 23, "written": 13, "failed": 1}
    (failed,) = [json.loads(line) for line in (tmp_path / "out/failed.jsonl").read_text().splitlines()]
    assert failed["id"] == "c/11#2" and "cannot say this" in failed["reason"]
    assert "c/11#2" not in (tmp_path / "out/chats.jsonl").read_text()
    assert not [path for path in (tmp_path / "out/audio").rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("", "wrote no readable audio"),
        ("import sys; open(sys.argv[1], 'wb').write(b'noise' * 9)", "wrote no readable audio"),
        (SPEAK + "speak('', sys.argv[1])", "wrote no sound"),
        ("raise ValueError('broken')", "ended with status 1: ValueError: broken"),
    ],
)
def test_a_synthesizer_that_does_not_work_is_an_error(tmp_path, program, reason):
    rule = f"of 8 turns failed, more than 5.00% .*; the first, c/0#1: the synthesizer {reason}"
    with pytest.raises(DataError, match=rule):
        speak_chats(write_chats(tmp_path, 4, "a"), tmp_path / "out", command(tmp_path, program, True), workers=1)
    assert not (tmp_path / "out/manifest.jsonl").exists()


def test_a_side_of_a_conversation_keeps_its_voice(tmp_path):
    program = SPEAK + "speak(sys.argv[2] * 3, sys.argv[1])"
    path = tmp_path / "synthesizer.py"
    path.write_text(program)
    run = f"{sys.executable} -I {path} {{output}} {{voice}}"
    speak_chats(write_chats(tmp_path, 8, "b"), tmp_path / "out", run, voices=["a", "bb"], workers=2)
    records = read_manifest(tmp_path / "out/manifest.jsonl")
    assert {record.speaker for record in records} == {"a", "bb"}
    assert all(soundfile.info(record.audio).frames == 240 * len(record.speaker) for record in records)


@pytest.mark.parametrize(
    ("synthesizer", "rule"),
    [
        ("no-such-program -w {output}", "there is no such command"),
        ("", "there is no such command"),
        ("'", "No closing quotation"),
        (f"{sys.executable} {{voice}}", "needs voices"),
    ],
)
def test_wrong_commands_are_refused_before_anything_is_spoken(tmp_path, synthesizer, rule):
    with pytest.raises(ConfigError, match=rule):
        speak_chats(write_chats(tmp_path, 1, "a"), tmp_path / "out", synthesizer)
    assert not (tmp_path / "out").exists()


def test_one_failure_in_a_few_turns_is_too_many_unless_a_user_allows_it(tmp_path):
    chats, run = write_chats(tmp_path, 4, *["fine"] * 3, "fail"), command(tmp_path, ONE, True)
    with pytest.raises(DataError, match=r"1 of 8 turns failed, more than 5\.00% \(--max-failed\); the first, c/3#2: "):
        speak_chats(chats, tmp_path / "out", run, workers=1)
    counts = speak_chats(chats, tmp_path / "out", run, workers=1, max_failed=0.2)
    assert (counts["spoken"], counts["failed"]) == (7, 1)
