"""``manifest`` and ``tokenize`` of ``most prepare``, as a user runs them on published data sets."""

import json
import os
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
    assert status == 0 and out == f"{manifest}: 3 records (3 CC0-1.0)\n  splits: 3 validated\n"
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
    source = ("--source", "librispeech", "--root", tmp_path / "data", "--split", "dev-clean", "train-clean-100")
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


def test_what_each_split_gave_is_printed_and_written(call, tmp_path):
    published.librispeech(tmp_path / "data")
    source = ("--source", "librispeech", "--root", tmp_path / "data")
    status, out, _ = call("manifest", *source, "--lower-case", "--output", tmp_path / "m.jsonl")
    assert status == 0 and "  splits: 2 train-clean-100\n" in out
    assert json.loads((tmp_path / "m.jsonl").read_text().splitlines()[0])["text"] == "chapter 1240 sentence 0"
    splits = {"dev-clean": 2, "train-clean-100": 2}
    arguments = (*source, "--split", *splits)
    status, out, _ = call("tokenize", *arguments, "--codec", "c", "--output", tmp_path / "codes")
    assert status == 0 and "  splits: 2 dev-clean, 2 train-clean-100\n" in out
    assert CodesDataset(tmp_path / "codes").provenance["source"]["splits"] == splits
    call("manifest", *arguments, "--output", tmp_path / "m.jsonl")
    assert json.loads((tmp_path / "m.provenance.json").read_text())["source"]["splits"] == splits


def test_a_manifest_without_a_record_is_an_error_that_leaves_the_reasons(call, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": 1}\n')
    arguments = ("manifest", "--source", "nemo", "--root", tmp_path / "in.jsonl", "--output", tmp_path / "m.jsonl")
    status, _, err = call(*arguments)
    assert status == 1 and err.startswith(f"error: {tmp_path}/m.quarantine.jsonl: none of 1 records can be used")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "m.quarantine.jsonl"]
    (tmp_path / "in.jsonl").write_text("")
    (tmp_path / "m.quarantine.jsonl").unlink()
    status, _, err = call(*arguments)
    assert status == 1 and err == f"error: {tmp_path}/in.jsonl: empty manifest\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_repeated_conversations_are_warned_about(call, tmp_path):
    published.chat_parquet(tmp_path / "all" / "train-0.parquet")
    published.chat_parquet(tmp_path / "part" / "train-0.parquet")
    status, out, _ = call("manifest", "--source", "chat", "--root", tmp_path, "--output", tmp_path / "out" / "m.jsonl")
    assert status == 0 and out.endswith("warning: 2 of them repeat a conversation\n")


def test_hashed_audio_may_move_but_no_byte_of_it_may_change(call, tmp_path):
    published.nemo(tmp_path)
    wav = tmp_path / "wav/0.wav"
    arguments = ("tokenize", "--manifest", tmp_path / "train.jsonl", "--codec", "c", "--output", tmp_path / "codes")
    assert call(*arguments, "--hash-audio")[0] == 0
    content, times = bytearray(wav.read_bytes()), (wav.stat().st_atime_ns, wav.stat().st_mtime_ns)
    os.utime(wav, (0, 0))  # as a copy
    assert call(*arguments, "--hash-audio")[0] == 0
    status, _, err = call(*arguments)
    assert status == 1 and "codes.json: was made with --hash-audio; repeat it with that option, or remove it" in err
    content[-1] ^= 1
    wav.write_bytes(content)
    os.utime(wav, ns=times)
    status, _, err = call(*arguments, "--hash-audio")
    assert status == 1 and "codes.json: audio files were edited since (another content)" in err


def test_a_job_without_hashes_is_not_repeated_with_them(call, tmp_path):
    published.nemo(tmp_path)
    arguments = ("tokenize", "--manifest", tmp_path / "train.jsonl", "--codec", "c", "--output", tmp_path / "codes")
    assert call(*arguments)[0] == 0
    status, _, err = call(*arguments, "--hash-audio")
    assert status == 1 and "codes.json: was made without --hash-audio; repeat it without that option" in err


def test_audio_that_was_edited_between_two_shares_is_noticed(call, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_module, "SHARD_SIZES", (1, 1))
    published.nemo(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"audio_filepath": "wav/0.wav", "text": "a"}\n' * 2)
    arguments = ("tokenize", "--manifest", tmp_path / "train.jsonl", "--codec", "c", "--output", tmp_path / "codes")
    assert call(*arguments, "--shard", "0/2")[0] == 0
    published.write_audio(tmp_path / "wav/0.wav", published.sound(7, 0.6))
    status, _, err = call(*arguments, "--shard", "1/2")
    assert status == 1 and "codes.parts/job.json: audio files were edited since" in err
