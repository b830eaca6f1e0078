"""Published data as it is: odd quotes, torn rows, texts that reach beyond their audio, the same thing twice."""

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from megatron_most.data.preparation.collect import checked_records, collect
from megatron_most.data.preparation.manifest import Record, Rejection, open_audio
from megatron_most.data.preparation.sources.base import is_held_out
from megatron_most.data.storage.json_lines import parse_json_object, seconds_of
from megatron_most.errors import ConfigError, DataError
from tests.unit.data.preparation import published
from tests.unit.data.preparation.test_sources import records, rejections, spec


def common_voice(root: Path, rows: dict[str, str], durations: str | None = None) -> Path:
    """Clips by name and how the table writes their sentence."""
    for clip in rows:
        published.write_audio(root / "clips" / f"{clip}.mp3", published.sound(0), format="MP3")
    table = "".join(f"speaker\t{clip}.mp3\t{text}\tcy\n" for clip, text in rows.items())
    (root / "train.tsv").write_text("client_id\tpath\tsentence\tlocale\n" + table)
    if durations is not None:
        (root / "clip_durations.tsv").write_text("clip\tduration[ms]\n" + durations)
    return root


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ('"""The boat was late,"" she wrote."', '"The boat was late," she wrote.'),
        ('"She said ""no"", twice."', 'She said "no", twice.'),
        ('"""All."""', '"All."'),
        ('"All of it."', '"All of it."'),
        ('A lone " stays', 'A lone " stays'),
        ('He wrote "" and left', 'He wrote "" and left'),
        ('"Yes," he said, "and ""no"""', '"Yes," he said, "and ""no"""'),
        ('"', '"'),
    ],
)
def test_quotes_of_early_common_voice_releases_are_undone(tmp_path, written, text):
    [found] = records("common_voice", common_voice(tmp_path, {"a": written}))
    assert found.text == text


def test_a_sentence_of_two_quotes_is_empty(tmp_path):
    [found] = rejections("common_voice", common_voice(tmp_path, {"a": '""'}))
    assert "has no text" in found


@pytest.mark.parametrize("milliseconds", ["0", "-5", "", "soon", "nan", "1e400", "9" * 5000, "\u00b2"])
def test_a_clip_without_a_usable_duration_is_set_aside_alone(tmp_path, milliseconds):
    durations = f"a.mp3\t300\nb.mp3\t{milliseconds}\nc.mp3\n\nc.mp3\t300.5\n"
    root = common_voice(tmp_path, dict.fromkeys("abc", "hello"), durations)
    found = list(checked_records(spec("common_voice", root)))
    assert [item.id for item in found] == ["a", "b", "c"] and found[2].duration == 0.3005
    assert isinstance(found[1], Rejection) and found[1].where == f"{root}/train.tsv, line 3"
    assert "clip_durations.tsv, line 3: duration " in found[1].reason


def test_every_row_of_a_torn_table_is_a_record_or_a_reason(tmp_path):
    rows = {"a": "fine", "b": "torn\nin two", "c": "a\ttab", "d": "nul \0 here", "e": 'a lone " quote'}
    root = common_voice(tmp_path, rows)
    table = (root / "train.tsv").read_bytes()
    (root / "train.tsv").write_bytes(table + b"speaker\tf.mp3\t\xff\tcy\nspeaker\t\0.mp3\ttext\tcy\n")
    found = list(checked_records(spec("common_voice", root)))
    assert [item.id for item in found if isinstance(item, Record)] == ["a", "d", "e"]
    lines = [int(item.where.rpartition(" ")[2]) for item in found if isinstance(item, Rejection)]
    assert lines == [3, 4, 5, 8, 9]


@pytest.mark.parametrize("value", ["9" * 401, "1e999", "-1", "true", '"1"', "2e9", "NaN"])
def test_seconds_are_a_number_of_them(value):
    with pytest.raises(DataError, match="^duration=.{1,30}: must be a number of seconds, at most 1e"):
        seconds_of(parse_json_object(f'{{"duration": {value}}}'), "duration")


@pytest.mark.parametrize("part", [(0, 10**12), (10**30, 5), (0, 10**30)])
def test_a_part_beyond_its_file_is_one_line(tmp_path, part):
    published.write_audio(tmp_path / "a.wav", published.sound(0))
    with pytest.raises(DataError, match="cut off: [0-9]+ bytes of a member are missing"):
        open_audio(Record("a", "t", tmp_path / "a.wav", None, None, part=part))


def test_a_row_of_a_parquet_file_that_is_not_utf_8_is_set_aside_alone(tmp_path):
    texts = pyarrow.array([b"one", b"\xff", b"three"], pyarrow.binary()).view(pyarrow.utf8())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "train.parquet")
    found = list(checked_records(spec("text", tmp_path)))
    assert [item.text if isinstance(item, Record) else item.reason for item in found] == ["one", "not UTF-8", "three"]


def test_a_transcript_without_an_id_is_told(tmp_path):
    published.librispeech(tmp_path)
    transcripts = tmp_path / "train-clean-100/103/1240/103-1240.trans.txt"
    transcripts.write_text(" NO ID\n\n" + transcripts.read_text())
    assert rejections("librispeech", tmp_path) == [f"{transcripts}, line 1: has no id before the transcript"]


def cut(supervision: dict | None, start: float = 1.0, duration: float = 2.0, **more) -> dict:
    source = {"type": "file", "channels": [0], "source": "talk.wav"}
    supervisions = [] if supervision is None else [{"text": "some words", **supervision}]
    fields = {"id": "c", "start": start, "duration": duration, "channel": 0, "supervisions": supervisions}
    return {**fields, "recording": {"sources": [source]}, **more}


def write_cuts(folder: Path, *cuts: dict) -> Path:
    published.write_audio(folder / "talk.wav", published.sound(0, 6.0))
    (folder / "cuts.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in cuts))
    return folder / "cuts.jsonl"


@pytest.mark.parametrize(
    ("supervision", "segment"),
    [
        ({"start": 0.0, "duration": 2.0}, (1.0, 2.0)),
        ({"start": -0.05, "duration": 2.1}, (1.0, 2.0)),
        ({"start": 0.5, "duration": 1.0}, (1.5, 1.0)),
        ({"start": 0.5, "duration": 1.5}, (1.5, 1.5)),
        ({}, (1.0, 2.0)),
        (None, (1.0, 2.0)),
        ({"text": None, "start": -3.0, "duration": 9.0}, (1.0, 2.0)),
    ],
)
def test_a_cut_is_taken_where_its_text_is_said(tmp_path, supervision, segment):
    [found] = records("lhotse", write_cuts(tmp_path, cut(supervision)), needs_text=False)
    assert (found.offset, found.duration) == pytest.approx(segment)


@pytest.mark.parametrize(
    ("supervision", "rule"),
    [
        ({"start": -2.0, "duration": 6.0}, r"its text is of -2\.00\.\.4\.00 s, the cut holds 0\.\.2\.00 s"),
        ({"start": 0.0, "duration": 6.0}, "its text is of 0.00..6.00 s"),
        ({"start": 1.0, "duration": 1.2}, "its text is of 1.00..2.20 s"),
        ({"start": "0", "duration": 2.0}, "must be numbers of seconds"),
        ({"start": 0.0, "duration": 0}, "must be numbers of seconds"),
        ({"start": 10**400, "duration": 1.0}, "must be numbers of seconds"),
        ({"start": 0.0, "duration": 2.0, "channel": 1}, "the cut is of channel 0"),
    ],
)
def test_a_cut_whose_text_is_of_other_audio_is_set_aside(tmp_path, supervision, rule):
    good = cut({"start": 0.0, "duration": 2.0}, id="good")
    found = list(checked_records(spec("lhotse", write_cuts(tmp_path, cut(supervision), good))))
    assert [type(item) for item in found] == [Rejection, Record]
    with pytest.raises(AssertionError, match=rule):
        raise AssertionError(found[0].reason)


def test_channels_that_are_no_list_cost_one_cut(tmp_path):
    odd = cut({}, recording={"sources": [{"type": "file", "channels": 3, "source": "talk.wav"}]})
    [found] = rejections("lhotse", write_cuts(tmp_path, odd))
    assert "the recording has 3" in found


def test_a_member_of_the_exact_name_comes_before_one_without_its_ending(tmp_path):
    sounds = {name: published.encoded(published.sound(seed)) for seed, name in enumerate("abc")}
    members = {"talk.flac": sounds["a"][0], "talk-sub1.flac": sounds["b"][0], "other.flac": sounds["c"][0]}
    published.write_tar(tmp_path / "audio_0.tar", members)
    names = ["talk-sub1.flac", "talk.flac", "talk-sub2.flac", "other-sub1.flac"]
    entries = [{"audio_filepath": name, "text": name, "id": name, "shard_id": 0} for name in names]
    (tmp_path / "tarred_audio_manifest.json").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    found = {record.id: open_audio(record).read() for record in records("nemo_tarred", tmp_path)}
    expected = ["talk-sub1.flac", "talk.flac", "talk.flac", "other.flac"]
    assert found == {name: members[member] for name, member in zip(names, expected, strict=True)}


def conversation(number: int) -> dict:
    return {"messages": [{"role": "user", "content": f"q {number}"}, {"role": "assistant", "content": f"a {number} "}]}


def test_a_conversation_that_is_published_twice_is_taken_once_and_counted(tmp_path):
    for part, numbers in (("all", (0, 1, 2)), ("everyday", (0, 1)), ("rewrite", (2,))):
        (tmp_path / part).mkdir()
        lines = "".join(json.dumps(conversation(number)) + "\n" for number in numbers)
        (tmp_path / part / "train-0.jsonl").write_text(lines)
    collected = collect(spec("chat", tmp_path), tmp_path / "m", tmp_path / "q")
    assert (collected.num_records, collected.num_rejected, collected.num_repeated) == (3, 3, 3)
    [first, *_] = rejections("chat", tmp_path)
    assert first == (
        f"{tmp_path}/everyday/train-0.jsonl, line 1: is the conversation of {tmp_path}/all/train-0.jsonl, line 1 again"
    )


def test_what_is_held_out_from_training_is_left_out_unless_it_is_named(tmp_path):
    published.librispeech(tmp_path / "speech")
    assert {record.split for record in records("librispeech", tmp_path / "speech")} == {"train-clean-100"}
    assert {r.split for r in records("librispeech", tmp_path / "speech", splits=("dev-clean",))} == {"dev-clean"}
    text = tmp_path / "text"
    text.mkdir()
    for split in ("train", "dev", "test"):
        (text / f"{split}-00000-of-00001.jsonl").write_text(json.dumps({"text": split}) + "\n")
    assert [record.text for record in records("text", text)] == ["train"]
    assert [record.text for record in records("text", text / "dev-00000-of-00001.jsonl")] == ["dev"]
    (text / "train-00000-of-00001.jsonl").unlink()
    with pytest.raises(ConfigError, match="holds only dev, test, which are not for training; name them with --split"):
        records("text", text)
    with pytest.raises(ConfigError, match="split train: .* holds dev, test"):
        records("text", text, splits=("train",))


def test_tars_are_of_the_split_that_their_folder_or_name_tells(tmp_path):
    published.webdataset(tmp_path / "a" / "train")
    published.webdataset(tmp_path / "a" / "valid")
    assert {record.split for record in records("webdataset", tmp_path / "a")} == {"train"}
    flac, _ = published.encoded(published.sound(0))
    for name in ("train-000000", "test-000000"):
        published.write_tar(tmp_path / "b" / f"{name}.tar", {"x.flac": flac, "x.txt": b"x"})
    assert [record.split for record in records("webdataset", tmp_path / "b")] == ["train"]


@pytest.mark.parametrize(
    ("split", "expected"),
    [("dev-clean", True), ("test_other", True), ("Validation", True), ("train", False), ("validated", False)],
)
def test_names_of_held_out_splits(split, expected):
    assert is_held_out(split) is expected


def test_capitals_are_folded_when_a_user_asks_for_it(tmp_path):
    published.librispeech(tmp_path)
    folded = records("librispeech", tmp_path, lower_case=True)
    assert folded[0].text == "chapter 1240 sentence 0"
    published.common_voice(tmp_path / "cy")
    assert records("common_voice", tmp_path / "cy", lower_case=True)[0].text == 'Dywedodd "helo" 0.'


def test_the_state_of_audio_files_is_part_of_what_was_collected(tmp_path):
    published.nemo(tmp_path)
    first, second = (collect(spec("nemo", tmp_path / "train.jsonl"), tmp_path / "m", tmp_path / "q") for _ in "ab")
    assert first == second and first.splits == {"unknown": 3}
    published.write_audio(tmp_path / "wav/1.wav", published.sound(9, 0.4))
    edited = collect(spec("nemo", tmp_path / "train.jsonl"), tmp_path / "m", tmp_path / "q")
    assert edited.sha256 == first.sha256 and edited.audio_sha256 != first.audio_sha256


def test_a_source_without_records_leaves_no_files(tmp_path):
    (tmp_path / "train.jsonl").write_text("\n")
    with pytest.raises(DataError, match="empty manifest"):
        collect(spec("nemo", tmp_path / "train.jsonl"), tmp_path / "m", tmp_path / "q")
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]
