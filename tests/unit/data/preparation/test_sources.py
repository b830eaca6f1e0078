"""Each published layout gives the records it holds, with their audio; what is broken is told with its line."""

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from megatron_most.data.preparation.chat_files import read_chats
from megatron_most.data.preparation.collect import SourceSpec, checked_records, collect
from megatron_most.data.preparation.manifest import Record, Rejection, Turn, read_manifest, read_waveform
from megatron_most.data.preparation.sources import SOURCES, SourceOptions, open_source
from megatron_most.data.storage import json_lines as lines_module
from megatron_most.errors import ConfigError, DataError
from tests.unit.data.preparation import published


def spec(name: str, root: Path, *audio_roots: Path, **options) -> SourceSpec:
    return SourceSpec(name, str(root), tuple(map(str, audio_roots)), SourceOptions(**options))


def records(name: str, root: Path, *audio_roots: Path, **options) -> list[Record]:
    found = list(checked_records(spec(name, root, *audio_roots, **options)))
    assert not [item for item in found if isinstance(item, Rejection)]
    return found


def rejections(name: str, root: Path, **options) -> list[str]:
    found = checked_records(spec(name, root, **options))
    return [f"{item.where}: {item.reason}" for item in found if isinstance(item, Rejection)]


@pytest.mark.parametrize("name", published.PUBLISHED)
def test_a_published_layout_is_read_with_its_audio(tmp_path, name):
    expected = published.PUBLISHED[name](tmp_path)
    found = {record.id: record for record in records(name, tmp_path, **published.ALL_SPLITS.get(name, {}))}
    assert sorted(found) == sorted(item.id for item in expected)
    for item in expected:
        record = found[item.id]
        assert record.text == item.text
        np.testing.assert_array_equal(read_waveform(record, published.RATE), item.waveform)


@pytest.mark.parametrize("name", published.PUBLISHED)
def test_a_manifest_of_a_source_is_a_source(tmp_path, name):
    published.PUBLISHED[name](tmp_path / "data")
    options = published.ALL_SPLITS.get(name, {})
    collected = collect(spec(name, tmp_path / "data", **options), tmp_path / "m.jsonl", tmp_path / "q.jsonl")
    again = read_manifest(tmp_path / "m.jsonl")
    for record, original in zip(again, records(name, tmp_path / "data", **options), strict=True):
        assert record.to_entry() == original.to_entry()
    assert (collected.num_records, collected.num_rejected) == (len(again), 0)
    assert (tmp_path / "q.jsonl").read_bytes() == b""
    assert records("nemo", tmp_path / "m.jsonl", tmp_path / "data")[0].id == again[0].id


def test_every_source_of_audio_has_a_published_layout_here():
    assert {name for name, source in SOURCES.items() if source.has_audio} == {*published.PUBLISHED, "lhotse"}


def test_librispeech_knows_split_speaker_language_and_license(tmp_path):
    published.librispeech(tmp_path)
    everything = published.ALL_SPLITS["librispeech"]
    first = records("librispeech", tmp_path, **everything)[0]
    assert (first.split, first.speaker, first.language, first.license) == ("dev-clean", "84", "en", "CC BY 4.0")
    assert [record.speaker for record in records("librispeech", tmp_path, splits=("train-clean-100",))] == ["103"] * 2
    with pytest.raises(ConfigError, match="split train-clean-360: .* holds dev-clean, train-clean-100"):
        records("librispeech", tmp_path, splits=("train-clean-360",))
    (tmp_path / "dev-clean/84/121123/84-121123-0001.flac").unlink()
    [gone] = rejections("librispeech", tmp_path, **everything)
    assert "84-121123.trans.txt, line 2: " in gone and "no such file" in gone


def test_libriheavy_has_two_texts(tmp_path):
    published.libriheavy(tmp_path)
    first = records("libriheavy", tmp_path, text_field="plain")[0]
    assert first.text == "WHY SHE ASKED NUMBER 0"
    assert (first.language, first.speaker, first.split, first.offset, first.duration) == (
        "en",
        "100",
        "small",
        0.25,
        0.5,
    )
    with pytest.raises(ConfigError, match="text field upper: must be printed or plain"):
        records("libriheavy", tmp_path, text_field="upper")


def test_common_voice_reads_the_split_that_is_asked_for(tmp_path):
    published.common_voice(tmp_path)
    first = records("common_voice", tmp_path)[0]
    assert (first.split, first.speaker, first.language, first.duration) == ("train", "f00d0", "cy", 1.0)
    assert records("common_voice", tmp_path, splits=("validated",))[0].split == "validated"
    with pytest.raises(ConfigError, match="split test: .* holds train, validated"):
        records("common_voice", tmp_path, splits=("test",))
    with open(tmp_path / "train.tsv", "a") as file:
        file.write("too\tfew\n")
    [short] = rejections("common_voice", tmp_path)
    assert short.endswith("train.tsv, line 5: has 2 columns, the header has 13")
    (tmp_path / "train.tsv").write_text("client_id\tpath\n")
    with pytest.raises(DataError, match=r"train\.tsv: has no column 'sentence'"):
        records("common_voice", tmp_path)


def test_voxpopuli_as_the_hub_has_it(tmp_path):
    expected = published.voxpopuli(tmp_path / "en", from_hub=True)
    found = records("voxpopuli", tmp_path / "en", text_field="raw_text")
    assert [record.text for record in found] == ["Mr President, 0!", "Mr President, 1!"]
    assert (found[0].speaker, found[0].language, found[0].split) == ("28150", "en", "train")
    np.testing.assert_array_equal(read_waveform(found[1], published.RATE), expected[1].waveform)


def test_lhotse_cuts_as_lhotse_writes_them(tmp_path):
    lhotse = pytest.importorskip("lhotse")
    waveform = published.write_audio(
        tmp_path / "talk.wav", np.stack([published.sound(0, 2.0), published.sound(1, 2.0)], 1)
    )
    recording = lhotse.Recording.from_file(tmp_path / "talk.wav")
    cuts = []
    for channel, start in ((0, 0.0), (1, 0.5)):
        supervision = lhotse.SupervisionSegment(
            f"s{channel}", "talk", 0.0, 1.0, channel, text=f"side {channel}", language="cy", speaker=f"p{channel}"
        )
        cuts.append(
            lhotse.MonoCut(f"cut{channel}", start, 1.0, channel, recording=recording, supervisions=[supervision])
        )
    lhotse.CutSet.from_cuts(cuts).to_file(tmp_path / "talks_cuts_dev.jsonl.gz")
    found = records("lhotse", tmp_path, splits=("dev",))
    assert [(record.id, record.text, record.speaker, record.split) for record in found] == [
        ("cut0", "side 0", "p0", "dev"),
        ("cut1", "side 1", "p1", "dev"),
    ]
    np.testing.assert_array_equal(read_waveform(found[1], published.RATE), waveform[4000:12000, 1])


@pytest.mark.parametrize(("channel", "place"), [(1, 0), (3, 1)])
def test_a_channel_of_a_cut_is_heard_by_its_place_in_the_file(tmp_path, channel, place):
    """Lhotse numbers channels by the recording, which may hold only some of them: here 1 and 3, in a file of two."""
    sides = np.stack([published.sound(0), published.sound(1)], axis=1)
    written = published.write_audio(tmp_path / "talk.wav", sides, subtype="FLOAT")
    cut = {
        "id": "a", "start": 0.0, "duration": 0.3, "channel": channel, "supervisions": [{"text": "hello"}],
        "recording": {"sources": [{"type": "file", "channels": [1, 3], "source": "talk.wav"}]},
    }  # fmt: skip
    (tmp_path / "cuts.jsonl").write_text(json.dumps(cut) + "\n")
    [found] = records("lhotse", tmp_path / "cuts.jsonl")
    np.testing.assert_array_equal(read_waveform(found, published.RATE), written[:, place])
    (tmp_path / "cuts.jsonl").write_text(json.dumps(cut | {"channel": 0}) + "\n")
    [reason] = rejections("lhotse", tmp_path / "cuts.jsonl")
    assert reason.endswith("channel=0: the recording has [1, 3]")


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"type": "MixedCut"}, "only MonoCut is read"),
        ({"start": None}, "start and duration: must be numbers"),
        ({"duration": 0}, "start and duration: must be numbers"),
        ({"channel": 1}, "channel=1: the recording has [0]"),
        ({"supervisions": [{}, {}]}, "supervisions: must be at most one"),
        ({"recording": None}, "recording: is missing"),
        ({"source": {"type": "command", "channels": [0], "source": "touch pwned"}}, "one source of type 'file'"),
        (
            {"source": {"type": "url", "channels": [0], "source": "https://a.example/b.wav"}},
            "one source of type 'file'",
        ),
        ({"source": {"type": "file", "channels": [0], "source": "s3://a/b.wav"}}, "an address is not read"),
        ({"transforms": [{"name": "Speed"}]}, "recording.transforms: must be empty"),
    ],
)
def test_cuts_that_cannot_be_read_are_told(tmp_path, change, rule):
    published.libriheavy(tmp_path)
    with gzip.open(tmp_path / "libriheavy_cuts_small.jsonl.gz", "rt") as file:
        cut = json.loads(file.readline())
    if "source" in change:
        cut["recording"]["sources"] = [change["source"]]
    elif "transforms" in change:
        cut["recording"] |= change
    else:
        cut |= change
    (tmp_path / "cuts.jsonl").write_text("\n" + json.dumps(cut))
    [found] = rejections("lhotse", tmp_path / "cuts.jsonl")
    assert found.startswith(f"{tmp_path}/cuts.jsonl, line 2: ") and rule in found


def test_samples_of_a_web_dataset_that_lack_something(tmp_path):
    flac, _ = published.encoded(published.sound(0))
    members = {"a.txt": b"no audio", "b.flac": flac, "b.txt": b"\xff", "c.flac": flac, "c.json": b"[]", "d.flac": flac}
    published.write_tar(tmp_path / "s.tar", members)
    found = rejections("webdataset", tmp_path)
    for key, rule in (
        ("a", "has 0 audio members"),
        ("b", "not UTF-8"),
        ("c", "must be a JSON object"),
        ("d", "no text"),
    ):
        [reason] = [text for text in found if text.startswith(f"{tmp_path}/s.tar, {key}: ")]
        assert rule in reason
    assert len(found) == 4


@pytest.mark.parametrize(
    "damage", [lambda tar: tar[: tar.index(b"fLaC") + 700], gzip.compress, lambda tar: b"tar?" * 999]
)
def test_an_archive_that_is_cut_off_or_no_tar_is_an_error(tmp_path, damage):
    published.webdataset(tmp_path)
    path = tmp_path / "000001.tar"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"000001\.tar: not readable as an uncompressed tar: "):
        list(checked_records(spec("webdataset", tmp_path)))


def test_a_tarred_manifest_names_members_that_are_there(tmp_path):
    published.nemo_tarred(tmp_path)
    with open(tmp_path / "tarred_audio_manifest.json", "a") as file:
        file.write(
            '{"audio_filepath": "gone.flac", "text": "x", "shard_id": 1}\n{"audio_filepath": "a", "text": "x"}\n'
        )
    found = rejections("nemo_tarred", tmp_path)
    assert [text.split(", ", 1)[1] for text in found] == [
        "line 8: shard_id=None: must be the number of a shard",
        "line 7: gone.flac: is not in shard 1",
    ]


def test_text_corpora(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": " one \\u2028 "}\n\n{"id": "x", "text": "two", "language": "cy"}\n{"t": 1}\n'
    )
    (tmp_path / "b.txt").write_text("first\nparagraph\n\n\nsecond\n")
    (tmp_path / "sub").mkdir()
    parquet.write_table(pyarrow.table({"text": ["row", None]}), tmp_path / "sub" / "train-00000-of-00001.parquet")
    found = [item for item in checked_records(spec("text", tmp_path)) if isinstance(item, Record)]
    assert [(record.id, record.text, record.split) for record in found] == [
        ("a:1", "one", "a"),
        ("x", "two", "a"),
        ("b:1", "first\nparagraph", "b"),
        ("b:5", "second", "b"),
        ("sub/train-00000-of-00001:1", "row", "train"),
    ]
    assert [text.rsplit("/", 1)[1] for text in rejections("text", tmp_path)] == [
        "a.jsonl, line 4: text: is missing or empty",
        "train-00000-of-00001.parquet, row 2: text: is missing or empty",
    ]
    (tmp_path / "sub" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=r"\.parquet: not readable as Parquet: "):
        rejections("text", tmp_path)


def test_chat_data_from_parquet_and_json_lines(tmp_path):
    talks = published.chat_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    (tmp_path / "more.jsonl").write_text(
        json.dumps({"id": "m", "messages": talks[0][1:]}) + '\n{"messages": [{"role": 1}]}\n'
    )
    found = [item for item in checked_records(spec("chat", tmp_path)) if isinstance(item, Record)]
    assert [record.id for record in found] == ["data/train-00000-of-00001:1", "data/train-00000-of-00001:2", "m"]
    assert found[1].turns == (Turn("user", "2+2?"), Turn("assistant", "Four."))
    assert [text.rsplit("/", 1)[1] for text in rejections("chat", tmp_path)] == [
        "more.jsonl, line 2: messages[0]: must have a role and a content, both texts"
    ]
    collect(spec("chat", tmp_path), tmp_path / "m.jsonl.out", tmp_path / "q")
    again = read_manifest(tmp_path / "m.jsonl.out", needs_audio=False)
    assert [record.turns for record in again] == [record.turns for record in found]


@pytest.mark.parametrize(
    ("messages", "rule"),
    [
        ([("user", "Hi")], "messages must be of user and assistant in turn, found user"),
        ([("user", "Hi"), ("tool", "{}"), ("assistant", "a")], "in turn, found user tool assistant"),
        ([("user", "Hi"), ("system", "a"), ("assistant", "a")], "in turn, found user system assistant"),
        ([("user", "Hi"), ("assistant", " ")], "messages[1]: is empty"),
        ([("system", "a")], "in turn, found none"),
    ],
)
def test_conversations_that_no_dataset_can_be_built_from_are_set_aside_one_by_one(tmp_path, messages, rule):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    bad = {"messages": [{"role": role, "content": content} for role, content in messages]}
    (tmp_path / "c.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    [found] = rejections("chat", tmp_path / "c.jsonl")
    assert found.startswith(f"{tmp_path}/c.jsonl, line 2: ") and rule in found
    # What is left is what `build --task chat` reads.
    collect(spec("chat", tmp_path / "c.jsonl", license="CC0"), tmp_path / "m", tmp_path / "q")
    [chat] = read_chats(tmp_path / "m")
    assert len(chat.exchanges) == 1 and chat.license == "CC0"


def test_what_a_user_says_fills_what_a_record_does_not(tmp_path):
    published.nemo(tmp_path)
    said = records("nemo", tmp_path / "train.jsonl", language="cy", license="CC0-1.0")[0]
    assert (said.language, said.license) == ("cy", "CC0-1.0")
    collected = collect(spec("nemo", tmp_path / "train.jsonl"), tmp_path / "m", tmp_path / "q")
    assert collected.licenses == {"unknown": 3}


@pytest.mark.parametrize("key", ["license", "licence"])
def test_a_license_is_read_in_either_spelling_and_written_in_one(tmp_path, key):
    published.nemo(tmp_path)
    manifest = tmp_path / "train.jsonl"
    manifest.write_text(manifest.read_text().replace('{"audio', f'{{"{key}": "MIT", "audio'))
    assert [record.license for record in records("nemo", manifest, license="CC0-1.0")] == ["MIT"] * 3
    collected = collect(spec("nemo", manifest), tmp_path / "m", tmp_path / "q")
    assert collected.licenses == {"MIT": 3}
    assert (tmp_path / "m").read_text().count('"license": "MIT"') == 3 and '"licence"' not in (
        tmp_path / "m"
    ).read_text()


@pytest.mark.parametrize("key", ["license", "licence"])
def test_texts_conversations_and_web_datasets_keep_their_license(tmp_path, key):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "a", key: "MIT"}) + "\n")
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages, key: "MIT"}) + "\n")
    parquet.write_table(pyarrow.table({"text": ["a"], key: ["MIT"]}), tmp_path / "text.parquet")
    flac, _ = published.encoded(published.sound(0))
    published.write_tar(tmp_path / "s.tar", {"a.flac": flac, "a.json": json.dumps({"text": "a", key: "MIT"}).encode()})
    sources = (("text", "text.jsonl"), ("text", "text.parquet"), ("chat", "chat.jsonl"), ("webdataset", "s.tar"))
    for name, file in sources:
        assert [record.license for record in records(name, tmp_path / file)] == ["MIT"], file
    [chat] = read_chats(tmp_path / "chat.jsonl")
    assert chat.license == "MIT"


def hostile_lines(folder: Path) -> dict[str, tuple[bytes, str]]:
    """What -> a line of a manifest, and the reason it is quarantined for."""
    outside = folder.parent / "outside.wav"
    published.write_audio(outside, published.sound(0))
    (folder / "link.wav").symlink_to(outside)
    (folder / "linked").symlink_to(folder.parent)
    os.mkfifo(folder / "pipe.wav")

    def line(**entry) -> bytes:
        return json.dumps({"audio_filepath": "wav/0.wav", "text": "t", **entry}).encode()

    return {
        "bad JSON": (b'{"audio_filepath": ', "not JSON"),
        "deep JSON": (b"[" * 4000, "not JSON"),
        "not an object": (b"17", "must be a JSON object"),
        "not UTF-8": (b'{"text": "\xff"}', "not UTF-8"),
        "huge line": (line(text="x" * 5000), "longer than"),
        "missing key": (b'{"text": "t"}', "audio_filepath is missing"),
        "no text": (line(text=None), "text=None: must be a text that is not empty"),
        "dot dot": (line(audio_filepath="../outside.wav"), "lies outside of"),
        "absolute": (line(audio_filepath=str(outside)), "lies outside of"),
        "device": (line(audio_filepath="/dev/zero"), "lies outside of"),
        "link": (line(audio_filepath="link.wav"), "lies outside of"),
        "linked folder": (line(audio_filepath="linked/outside.wav"), "lies outside of"),
        "pipe": (line(audio_filepath="pipe.wav"), "not a regular file"),
        "folder": (line(audio_filepath="wav"), "not a regular file"),
        "absent": (line(audio_filepath="wav/absent.wav"), "no such file"),
        "long name": (line(audio_filepath="x" * 5000), "longer than"),
        "null": (line(audio_filepath="wav/\0.wav"), "must be a path"),
        "address": (line(audio_filepath="https://a.example/b.wav"), "an address is not read"),
        "duplicate": (line(id="train:1"), "id 'train:1' is already that of another record"),
        "half a pair": (line(id="z", text="\ud800"), "not Unicode"),
        "half a pair as id": (line(id="\ud800"), "not Unicode"),
        "wrong type": (line(duration="long"), "duration='long': must be a number of seconds"),
        "infinite": (line(offset=1e999), "offset=inf: must be a number of seconds"),
        "part": (line(part=[0, -1]), "part=[0, -1]"),
    }


def test_a_hostile_manifest_is_quarantined_line_by_line(tmp_path, monkeypatch):
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 4096)
    folder = tmp_path / "data"
    published.nemo(folder)
    hostile = hostile_lines(folder)
    good = (folder / "train.jsonl").read_bytes()
    lines = [line for line, _ in hostile.values()]
    (folder / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + good + b"\n".join(lines))
    collected = collect(spec("nemo", folder / "train.jsonl"), tmp_path / "m", tmp_path / "q")
    entries = [json.loads(line) for line in (tmp_path / "q").read_text().splitlines()]
    for number, ((what, (_, reason)), entry) in enumerate(zip(hostile.items(), entries, strict=True), start=4):
        assert entry["where"] == f"{folder}/train.jsonl, line {number}", what
        assert reason in entry["reason"], what
    # The byte order mark does no harm: the first line is a record.
    assert (collected.num_records, collected.num_rejected) == (3, len(hostile))


def test_a_line_of_100_mb_is_never_held(tmp_path):
    published.nemo(tmp_path)
    with open(tmp_path / "train.jsonl", "ab") as file:
        for _ in range(100):
            file.write(b"x" * (1 << 20))
        file.write(b"\n" + b'{"audio_filepath": "wav/1.wav", "text": "after", "id": "after"}')
    tracemalloc.start()
    found = list(checked_records(spec("nemo", tmp_path / "train.jsonl")))
    assert tracemalloc.get_traced_memory()[1] < 60 << 20
    tracemalloc.stop()
    assert found[3].reason == "longer than 16 MiB" and found[3].where.endswith("line 4")
    assert found[4].text == "after"


def test_files_of_a_source_are_read_inside_its_roots_only(tmp_path):
    published.librispeech(tmp_path / "a")
    published.common_voice(tmp_path / "b")
    published.webdataset(tmp_path / "c")
    inside = tmp_path / "inside"
    (inside / "train-clean-100/103/1240").mkdir(parents=True)
    transcripts = "train-clean-100/103/1240/103-1240.trans.txt"
    for name, folder in ((transcripts, "a"), ("train.tsv", "b"), ("000000.tar", "c")):
        (inside / name).symlink_to(tmp_path / folder / name)
    for name in ("librispeech", "common_voice", "webdataset"):
        with pytest.raises(DataError, match="lies outside of"):
            records(name, inside)
    assert len(records("webdataset", inside, tmp_path / "c")) == 2  # unless the user says so


def test_a_source_that_is_not_there(tmp_path):
    for name in SOURCES:
        with pytest.raises(DataError, match="absent: no such manifest or folder"):
            open_source(name, tmp_path / "absent")
        with pytest.raises((DataError, ConfigError), match=str(tmp_path)) as caught:
            collect(spec(name, tmp_path), tmp_path / "m", tmp_path / "q")
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="source melt: must be one of nemo, librispeech, "):
        open_source("melt", tmp_path)
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="pipe.jsonl: not a regular file"):
        list(open_source("nemo", tmp_path / "pipe.jsonl").records())


@pytest.mark.parametrize("name", published.PUBLISHED)
def test_a_root_may_be_named_from_the_folder_that_a_command_runs_in(tmp_path, monkeypatch, name):
    expected = published.PUBLISHED[name](tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    for root in ("data", "data/../data"):
        found = {record.id: record for record in records(name, Path(root), **published.ALL_SPLITS.get(name, {}))}
        for item in expected:
            np.testing.assert_array_equal(read_waveform(found[item.id], published.RATE), item.waveform)
    with pytest.raises(DataError, match="^gone: no such manifest or folder"):
        open_source(name, "gone")


def test_a_manifest_in_another_folder_may_be_named_from_here(tmp_path, monkeypatch):
    published.nemo(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert len(records("nemo", Path("data/train.jsonl"))) == 3


def test_what_a_manifest_leaves_beside_itself_is_no_data(tmp_path):
    published.nemo(tmp_path)
    for name in ("train.quarantine.jsonl", "train.provenance.json"):
        (tmp_path / name).write_text('{"reason": "not a record"}\n')
    assert len(records("nemo", tmp_path)) == 3
