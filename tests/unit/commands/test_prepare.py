"""``most prepare`` from manifest to inspected document, as a user runs it."""

import json
import re
import sys
from pathlib import Path

import pytest
import soundfile

from megatron_most import audio
from megatron_most.commands import prepare
from megatron_most.data.preparation import tokenize_audio as tokenize_module
from tests.unit.data.tiny import LoudnessCodec, write_wavs


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a command line in this process; returns exit status, standard output and standard error."""
    monkeypatch.setattr(tokenize_module, "load_codec", lambda name: LoudnessCodec())
    monkeypatch.setattr(audio, "load_codec", lambda name: LoudnessCodec())

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["most", "prepare", *map(str, arguments)])
        status = 0
        try:
            prepare.main(list(map(str, arguments)))
        except SystemExit as leaving:
            status = leaving.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def manifest(tmp_path) -> Path:
    path = tmp_path / "m.jsonl"
    entries = [{**entry, "text": f"the fox sees {entry['text']}"} for entry in write_wavs(tmp_path / "wav", 3)]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.mark.parametrize("layout", ["frame", "flat"])
def test_from_manifest_to_an_inspected_document(call, manifest, tmp_path, layout):
    tokenizer, codes, data = tmp_path / "t.model", tmp_path / "codes", tmp_path / "data"
    status, out, _ = call("tokenizer", "--manifest", manifest, "--vocab-size", 320, "--output", tokenizer)
    assert status == 0 and "ids from 3 texts" in out
    status, out, _ = call("tokenize", "--manifest", manifest, "--codec", "c.nemo", "--output", codes, "--workers", 1)
    assert status == 0 and "3 utterances, 0.00 h, codec loudness" in out
    build = ("build", "--task", "tts", "--codes", codes, "--tokenizer", tokenizer, "--output", data, "--layout", layout)
    status, out, _ = call(*build)
    assert status == 0 and f"task tts, layout {layout}, 3 documents" in out
    wav = tmp_path / "x.wav"
    shown = ("--document", 2, "--tokenizer", tokenizer, "--codec", "c.nemo", "--wav", wav)
    status, out, _ = call("inspect", "--dataset", data, *shown)
    assert status == 0 and "document 2: Say: the fox sees w2 [<17 frames>]" in out
    assert "most prepare build --task tts" in out  # the command that made it
    assert soundfile.info(wav).frames == 1700


def test_from_a_written_conversation_to_a_spoken_one(call, manifest, tmp_path):
    tokenizer, spoken, data = tmp_path / "t.model", tmp_path / "spoken", tmp_path / "data"
    call("tokenizer", "--manifest", manifest, "--vocab-size", 320, "--output", tokenizer)
    messages = [{"role": "user", "content": "what is red"}, {"role": "assistant", "content": "the fox"}]
    chat = tmp_path / "chat.jsonl"
    chat.write_text("".join(json.dumps({"id": name, "messages": messages}) + "\n" for name in ("a", "b")))
    program = tmp_path / "speak.py"
    program.write_text(
        "import sys, wave\nwith wave.open(sys.argv[1], 'wb') as file:\n"
        "    file.setparams((1, 2, 8000, 0, 'NONE', ''))\n"
        "    file.writeframes(b'ab' * 100 * len(sys.stdin.read()))"
    )
    synthesizer = f"{sys.executable} -I {program} {{output}}"
    status, out, _ = call("speechify", "--chat", chat, "--synthesizer", synthesizer, "--output", spoken)
    assert status == 0 and out == f"{spoken}: 4 spoken, 0 written, 0 failed\n"
    tokenize = ("tokenize", "--manifest", spoken / "manifest.jsonl", "--codec", "c.nemo", "--workers", 1)
    assert call(*tokenize, "--output", tmp_path / "codes")[0] == 0
    build = ("build", "--task", "chat", "--chat", spoken / "chats.jsonl", "--codes", tmp_path / "codes")
    build = (*build, "--tokenizer", tokenizer, "--output", data, "--modes", "S-S", "--layout", "flat_delay")
    status, _, err = call(*build)
    assert status == 1 and "special token system: " in err and "set text_vocab_size to at least" in err
    status, out, _ = call(*build, "--text-vocab-size", 400)
    assert status == 0 and "2 examples, 0 of them cut; 0 examples or parts rejected; 0 conversations without" in out
    assert "exchanges by mode: S-S 2" in out
    shown = ("--document", 1, "--tokenizer", tokenizer, "--codec", "c.nemo", "--wav", tmp_path / "x.wav")
    status, out, _ = call("inspect", "--dataset", data, *shown)
    assert status == 0 and "document 1: <11 frames> Answer aloud. [<7 frames>]" in out
    assert [soundfile.info(tmp_path / f"x-{n}.wav").frames for n in (1, 2)] == [1100, 700]
    status, out, _ = call("inspect", "--dataset", data, data)
    assert status == 0 and "duplicates: 1 documents are equal to an earlier one" in out
    assert re.search(r"chat +4 +0\.00", out) and out.count("#") > 0


def test_further_modalities_are_named_when_data_is_built_and_looked_into(call, manifest, tmp_path):
    tokenizer, data = tmp_path / "t.model", tmp_path / "data"
    call("tokenizer", "--manifest", manifest, "--vocab-size", 320, "--output", tokenizer)
    build = ("build", "--task", "text_lm", "--text", manifest, "--tokenizer", tokenizer, "--output", data)
    build = (*build, "--num-codebooks", 3, "--codebook-size", 50, "--overwrite")
    # Every piece of the tokenizer but its markers.
    status, _, _ = call(*build, "--modality", "image=3:320", "--text-vocab-size", 320)
    assert status == 0
    status, out, _ = call("inspect", "--dataset", data, "--document", 0, "--tokenizer", tokenizer)
    assert status == 0
    assert re.search(r"document 0: \[<\d+ image>\]", out)
    assert re.search(r"modality_positions': \{'text': 6, 'audio': 0, 'image': \d+\}", out)

    status, _, err = call(*build, "--modality", "image=3")
    assert status == 1 and err == "error: --modality=image=3: must be NAME=START:STOP, ids START to STOP - 1\n"
    status, _, err = call(*build, "--modality", "image=3:999", "--text-vocab-size", 320)
    assert status == 1 and "must be a range of the 320 text ids" in err


def test_errors_are_one_line_and_a_status(call, manifest, tmp_path):
    status, _, err = call("tokenize", "--manifest", tmp_path / "none.jsonl", "--codec", "c", "--output", tmp_path / "o")
    assert status == 1 and err == f"error: {tmp_path}/none.jsonl: no such manifest or folder\n"


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (("--document", 9), "--document=9: must be in 0..2"),
        (("--codec", "c"), "need --document"),
        (("--document", 0, "--wav", "x.wav"), "each needs the other"),
        (("--document", 0, "--codec", "c", "--wav", "x.wav"), "the document holds no audio"),
    ],
)
def test_inspecting_what_is_not_there_is_refused(call, manifest, tmp_path, arguments, rule):
    tokenizer, data = tmp_path / "t.model", tmp_path / "data"
    call("tokenizer", "--manifest", manifest, "--vocab-size", 320, "--output", tokenizer)
    size = ("--num-codebooks", 3, "--codebook-size", 50)
    call("build", "--task", "text_lm", "--text", manifest, "--tokenizer", tokenizer, "--output", data, *size)
    status, _, err = call("inspect", "--dataset", data, *arguments)
    assert status == 1 and rule in err and not Path("x.wav").exists()


@pytest.mark.parametrize("name", ["tokenizer", "tokenize", "build", "inspect"])
def test_every_command_has_help(call, name):
    status, out, _ = call(name, "--help")
    assert status == 0 and ("--dataset" if name == "inspect" else "--output") in out


def test_a_dataset_is_replaced_only_when_that_is_asked_for(call, manifest, tmp_path):
    tokenizer, data = tmp_path / "t.model", tmp_path / "data"
    call("tokenizer", "--manifest", manifest, "--vocab-size", 320, "--output", tokenizer)
    build = ("build", "--task", "text_lm", "--text", manifest, "--tokenizer", tokenizer, "--output", data)
    build = (*build, "--num-codebooks", 3, "--codebook-size", 50)
    assert call(*build)[0] == 0
    before = (tmp_path / "data.json").read_bytes()
    status, _, err = call(*build)
    assert status == 1 and err == f"error: {data}.json: exists already; name another --output, or add --overwrite\n"
    assert (tmp_path / "data.json").read_bytes() == before
    assert call(*build, "--overwrite")[0] == 0


def test_a_document_is_not_shown_with_another_tokenizer(call, manifest, tmp_path):
    tokenizer, other, data = tmp_path / "t.model", tmp_path / "other.model", tmp_path / "data"
    for path, size in ((tokenizer, 320), (other, 310)):
        call("tokenizer", "--manifest", manifest, "--vocab-size", size, "--output", path)
    build = ("build", "--task", "text_lm", "--text", manifest, "--tokenizer", tokenizer, "--output", data)
    assert call(*build, "--num-codebooks", 3, "--codebook-size", 50)[0] == 0
    for document in ((), ("--document", 0)):
        status, out, err = call("inspect", "--dataset", data, *document, "--tokenizer", other)
        assert (status, out) == (1, "")
        assert err == f"error: --tokenizer={other}: {data} was built with another, t.model\n"
    assert call("inspect", "--dataset", data, "--tokenizer", tokenizer)[0] == 0
