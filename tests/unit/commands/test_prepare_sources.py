"""``manifest`` and ``tokenize`` of ``most prepare``, as a user runs them on published data sets."""

import json
import sys

import pytest

from megatron_most.commands import prepare
from megatron_most.data.preparation import tokenize_audio as tokenize_module
from megatron_most.data.storage.codes import CodesDataset
from tests.unit.data.preparation import published
from tests.unit.data.tiny import LoudnessCodec


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a command line in this process; returns exit status, standard output and standard error."""
    monkeypatch.setattr(tokenize_module, "load_codec", lambda name: LoudnessCodec())

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["most", "prepare", *map(str, arguments)])
        status = 0
        try:
            prepare.main(list(map(str, arguments)))
        except SystemExit as leaving:
            status = leaving.code
        return status, *capsys.readouterr()

    return call


def test_from_a_published_data_set_to_codes_directly_or_by_a_manifest(call, tmp_path):
    published.common_voice(tmp_path / "cy")
    source = ("--source", "common_voice", "--root", tmp_path / "cy", "--split", "validated")
    status, out, _ = call("tokenize", *source, "--codec", "c", "--output", tmp_path / "direct" / "codes")
    assert status == 0
    assert "3 utterances, 0.00 h, codec loudness; 3 records = 3 tokenized + 0 in quarantine" in out

    manifest = tmp_path / "m" / "validated.jsonl"
    status, out, _ = call("manifest", *source, "--output", manifest)
    assert status == 0 and out == f"{manifest}: 3 records (3 CC0-1.0)\n"
    provenance = json.loads((tmp_path / "m" / "validated.provenance.json").read_text())
    assert provenance["source"]["name"] == "common_voice" and provenance["counts"] == {"records": 3, "quarantined": 0}
    assert provenance["command"].startswith("most prepare manifest --source common_voice")

    # A manifest elsewhere may name audio only in folders that the user names.
    status, _, err = call("tokenize", "--manifest", manifest, "--codec", "c", "--output", tmp_path / "by" / "codes")
    assert status == 1 and "3 of 3 records are in quarantine" in err and "lies outside of" in err
    arguments = ("--manifest", manifest, "--audio-root", tmp_path / "cy", "--codec", "c")
    status, _, _ = call("tokenize", *arguments, "--output", tmp_path / "by" / "codes")
    assert status == 0
    for ending in ("jsonl", "codes.bin"):
        assert (tmp_path / "by" / f"codes.{ending}").read_bytes() == (tmp_path / f"direct/codes.{ending}").read_bytes()


def test_what_cannot_be_used_is_counted_by_both_commands(call, tmp_path):
    published.librispeech(tmp_path / "data")
    next((tmp_path / "data").rglob("*.flac")).unlink()
    source = ("--source", "librispeech", "--root", tmp_path / "data")
    status, out, _ = call("manifest", *source, "--output", tmp_path / "m.jsonl")
    assert status == 0 and out.endswith(f"{tmp_path}/m.quarantine.jsonl: 1 that cannot be used\n")
    arguments = ("tokenize", *source, "--codec", "c", "--output", tmp_path / "codes")
    status, _, err = call(*arguments)
    assert status == 1 and "1 of 4 records are in quarantine, more than 1.00% (--max-quarantine)" in err
    status, out, _ = call(*arguments, "--max-quarantine", "0.25")
    assert status == 0 and "4 records = 3 tokenized + 1 in quarantine" in out


def test_shares_of_a_job_array(call, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_module, "SHARD_SIZES", (1, 1))
    published.nemo(tmp_path)
    arguments = ("tokenize", "--manifest", tmp_path / "train.jsonl", "--codec", "c", "--output", tmp_path / "codes")
    status, out, _ = call(*arguments, "--shard", "1/2")
    assert status == 0 and "shard 1/2 is done, others are not" in out
    status, out, _ = call(*arguments, "--shard", "0/2")
    assert status == 0 and len(CodesDataset(tmp_path / "codes")) == 3


def test_long_recordings_are_said_to_become_chunks(call, tmp_path):
    published.write_audio(tmp_path / "a.wav", published.sound(0, 2.5))
    (tmp_path / "m.jsonl").write_text('{"audio_filepath": "a.wav"}')
    arguments = ("tokenize", "--manifest", tmp_path / "m.jsonl", "--audio-only", "--codec", "c", "--max-seconds", 1)
    status, out, _ = call(*arguments, "--output", tmp_path / "codes")
    assert status == 0 and "3 utterances" in out and "1 recordings are longer than 1 s and became chunks" in out


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (("--source", "librispeech"), "--source and --root: each needs the other"),
        (("--manifest", "m", "--root", "r"), "--source and --root: each needs the other"),
        (("--manifest", "m", "--shard", "2/2"), "--shard=2/2: must be i/n with i in 0..n-1"),
        (("--manifest", "m", "--shard", "half"), "--shard=half: must be i/n"),
        (("--manifest", "m", "--max-seconds", "0"), "--max-seconds=0.0: must be greater than 0"),
        (("--manifest", "m", "--max-quarantine", "1.5"), "--max-quarantine=1.5: must be in 0..1"),
        (("--source", "melt", "--root", "r"), "invalid choice: 'melt'"),
        ((), "one of the arguments --manifest --source is required"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call, tmp_path, arguments, rule):
    status, _, err = call("tokenize", *arguments, "--codec", "c", "--output", tmp_path / "codes")
    assert status in (1, 2) and rule in err.splitlines()[-1]


def test_help_lists_every_source(call):
    for name in ("manifest", "tokenize"):
        status, out, _ = call(name, "--help")
        assert status == 0
        assert "libriheavy     libriheavy_cuts_SIZE.jsonl.gz" in out and "--audio-root" in out
