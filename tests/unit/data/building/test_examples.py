"""Examples of every task: cutting long ones, choosing spoken turns, and the counts."""

import gzip
import itertools
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_most.data.building.chat_modes import MODES
from megatron_most.data.building.examples import Examples, TemplateOptions
from megatron_most.data.building.instructions import INSTRUCTIONS
from megatron_most.data.building.interleave import alternate, group_of
from megatron_most.data.building.length_limit import POLICIES, LengthLimit, sentences
from megatron_most.data.building.special_tokens import special_tokens
from megatron_most.data.preparation.chat_files import read_chats
from megatron_most.data.storage import json_lines as lines_module
from megatron_most.data.storage.codes import CodesDataset
from megatron_most.data.storage.inspection import audio_of
from megatron_most.errors import ConfigError, DataError
from megatron_most.vocab import VocabLayout
from tests.unit.data.tiny import (
    CODEBOOK_SIZE,
    LAYOUTS,
    TEXT_VOCAB,
    LetterTokenizer,
    layout,
    random_codes,
    write_codes,
)

TOKENIZER = LetterTokenizer()
NAMES = ("1-2-0000", "1-2-0001", "1-2-0002", "1-3-0000", "chat#0", "chat#1", "talk#0")
"""Utterances: three of one recording, one of another, and the turns of conversations."""


@pytest.fixture(scope="module")
def codes(tmp_path_factory) -> CodesDataset:
    utterances = [(name, "fox", random_codes(14 + n % 3, seed=n)) for n, name in enumerate(NAMES)]
    return write_codes(tmp_path_factory.mktemp("codes") / "codes", utterances)


def write_texts(folder: Path, *texts: str) -> Path:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def limited(positions: int, policy: str = "reject") -> TemplateOptions:
    return TemplateOptions(limit=LengthLimit(positions, policy))


def test_long_utterances_are_rejected_and_counted(codes):
    whole = Examples("asr", layout(), TOKENIZER, TemplateOptions(), codes=[codes])
    lengths = sorted(len(document) - 1 for document in whole)
    examples = Examples("asr", layout(), TOKENIZER, limited(lengths[3]), codes=[codes])
    kept = list(examples)
    assert 0 < len(kept) < 7 and max(len(document) - 1 for document in kept) == lengths[3]
    assert examples.counts == {"examples": 7, "rejected": 7 - len(kept), "cut": 0}


@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_chunks_of_speech_hold_every_frame_in_order(codes, layout_name):
    vocab = layout(layout_name)
    examples = Examples("speech_lm", vocab, TOKENIZER, limited(16, "chunk"), codes=[codes])
    documents = list(examples)
    assert max(map(len, documents)) <= 17 and examples.counts["cut"] == 7 and not examples.counts["rejected"]
    found = np.concatenate([audio_of(document, vocab)[0] for document in documents])
    np.testing.assert_array_equal(found, np.concatenate([utterance.codes for utterance in codes]))


TEXT = "the fox. a dog sees it! what then? " * 3 + "averylongwordthatisnosentence" * 2 + ". the end."


@pytest.mark.parametrize("policy", ["chunk", "split"])
@pytest.mark.parametrize("positions", [5, 20, 41, len(TOKENIZER.encode(TEXT))])  # the last: eos alone is the rest
def test_a_long_text_is_cut_and_nothing_is_lost(tmp_path, policy, positions):
    examples = Examples("text_lm", layout(), TOKENIZER, limited(positions, policy), texts=[write_texts(tmp_path, TEXT)])
    documents = list(examples)
    assert max(map(len, documents)) <= positions + 1 and examples.counts["cut"] == 1
    assert all(document.ids[0] == TOKENIZER.bos_id for document in documents)
    assert all(not document.loss_mask[0] and document.loss_mask[1:].all() for document in documents)
    assert documents[-1].ids[-1] == TOKENIZER.eos_id
    words = "".join(TOKENIZER.decode(document.ids) for document in documents).replace(" ", "")
    assert words == TOKENIZER.decode(TOKENIZER.encode(TEXT)).replace(" ", "")


def test_splits_are_at_the_ends_of_sentences(tmp_path):
    text = "the fox. a dog sees it! what then? the end."
    examples = Examples("text_lm", layout(), TOKENIZER, limited(24, "split"), texts=[write_texts(tmp_path, text)])
    assert [TOKENIZER.decode(document.ids) for document in examples] == ["the fox a dog sees it", "what then the end"]


@given(st.text(alphabet="ab. \n!", max_size=60))
def test_sentences_joined_are_the_text(text):
    assert "".join(sentences(text)) == text


@given(st.lists(st.integers(1, 12), max_size=40), st.integers(1, 30))
def test_a_split_keeps_the_order_and_fits_as_much_as_it_can(lengths, positions):
    documents, too_long = LengthLimit(positions, "split").split(
        list(enumerate(lengths)), lambda parts: np.concatenate([[place] * length for place, length in parts] + [[-1]])
    )
    kept = [place for document in documents for place in dict.fromkeys(document[:-1].tolist())]
    assert sorted(kept + [place for place, _ in too_long]) == list(range(len(lengths))) and kept == sorted(kept)
    assert all(len(document) - 1 <= positions for document in documents)
    assert all(length > positions for _, length in too_long)
    # No document could have taken the first part of the next one that follows it directly.
    for first, second in itertools.pairwise(documents):
        if second[0] == first[-2] + 1:
            assert len(first) - 1 + lengths[second[0]] > positions


def test_interleaved_documents_tell_one_recording_in_turns(codes):
    examples = Examples("interleaved", layout(), TOKENIZER, TemplateOptions(), codes=[codes])
    documents = list(examples)
    assert examples.counts["examples"] == len(documents) == 2  # 1-2 and chat; a single utterance makes no document
    spoken = [len(layout().audio_segments(document.ids)) for document in documents]
    assert spoken[0] in (1, 2) and spoken[1] == 1
    utterances = list(codes)[:3]
    first = 0 if spoken[0] == 2 else 1
    for found, utterance in zip(audio_of(documents[0], layout()), utterances[first::2], strict=True):
        np.testing.assert_array_equal(found, utterance.codes)


@pytest.mark.parametrize(
    ("identity", "group"),
    [("84-121123-0007", "84-121123"), ("talk#3", "talk"), ("book/ch_1/12", "book/ch_1"), ("m:17", "m"), ("a", "a")],
)
def test_an_utterance_belongs_to_what_its_id_begins_with(identity, group):
    assert group_of(identity) == group


def write_chats(folder: Path, chats: dict[str, list[dict]]) -> Path:
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps({"id": name, "messages": messages}) + "\n" for name, messages in chats.items()))
    return path


def exchange(user_audio: str | None = None, assistant_audio: str | None = None) -> list[dict]:
    return [
        {"role": "user", "content": "the fox"} | ({"audio": user_audio} if user_audio else {}),
        {"role": "assistant", "content": "a dog"} | ({"audio": assistant_audio} if assistant_audio else {}),
    ]


def segments_of(mode: str) -> int:
    return mode.count("S")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_speaks_the_turns_it_says(codes, tmp_path, mode):
    path = write_chats(tmp_path, {"chat": exchange("chat#0", "chat#1")})
    examples = Examples("chat", layout(), TOKENIZER, TemplateOptions(modes=[mode]), codes=[codes], chats=[path])
    (document,) = examples
    assert len(audio_of(document, layout()) if "S" in mode else []) == segments_of(mode)
    table = special_tokens(layout(), TOKENIZER, roles=True)
    place = document.ids.tolist().index(table["user"]) + 1
    assert (document.ids[place] == layout().begin_of_audio) == (mode[0] == "S")
    place = document.ids.tolist().index(table["assistant"]) + 1
    assert (document.ids[place] == layout().begin_of_audio) == (mode[2] == "S") and document.loss_mask[place]
    assert examples.counts[mode] == 1


def test_modes_are_drawn_in_equal_shares_from_what_recordings_allow(codes, tmp_path):
    both = {f"b{n}": exchange("chat#0", "chat#1") for n in range(400)}
    path = write_chats(tmp_path, {**both, **{f"u{n}": exchange("talk#0") for n in range(200)}})
    examples = Examples("chat", layout(), TOKENIZER, TemplateOptions(), codes=[codes], chats=[path])
    segments = Counter(len(layout().audio_segments(document.ids)) for document in examples)
    counts = examples.counts
    assert all(75 < counts[mode] < 125 for mode in ("T-S", "S-S"))  # only the 400
    assert all(160 < counts[mode] < 240 for mode in ("T-T", "S-T"))
    assert segments[2] == counts["S-S"] and segments[1] == counts["T-S"] + counts["S-T"]
    again = Examples("chat", layout(), TOKENIZER, TemplateOptions(), codes=[codes], chats=[path])
    list(again)
    assert again.counts == counts


def test_each_exchange_draws_its_own_mode(codes, tmp_path):
    path = write_chats(tmp_path, {"chat": exchange("chat#0", "chat#1") * 40})
    examples = Examples("chat", layout(), TOKENIZER, TemplateOptions(), codes=[codes], chats=[path])
    assert len(list(examples)) == 1 and all(examples.counts[mode] for mode in MODES)


@pytest.mark.parametrize("task", ["interleaved", "chat"])
def test_spoken_parts_use_the_first_codebooks(codes, tmp_path, task):
    vocab = VocabLayout(TEXT_VOCAB, 2, CODEBOOK_SIZE)
    chats = [write_chats(tmp_path, {"chat": exchange("chat#0", "chat#1")})] if task == "chat" else []
    examples = Examples(task, vocab, TOKENIZER, TemplateOptions(modes=["S-S"]), codes=[codes], chats=chats)
    found = [part.tolist() for document in examples for part in audio_of(document, vocab)]
    known = [utterance.codes[:, :2].tolist() for utterance in codes]
    assert len(found) > 1 and all(part in known for part in found)


@pytest.mark.parametrize("task", POLICIES)
def test_the_loss_option_holds_for_every_task(codes, tmp_path, task):
    chats = [write_chats(tmp_path, {"chat": exchange("chat#0", "chat#1")})] if task == "chat" else []
    options = TemplateOptions(loss="everything")
    documents = list(Examples(task, layout(), TOKENIZER, options, codes=[codes], chats=chats))
    assert documents and all(document.loss_mask[1:].all() for document in documents)


def test_some_recordings_begin_with_text_and_some_with_audio(codes):
    starts = {type(alternate(f"recording {n}", codes)[0]) for n in range(20)}
    assert starts == {str, np.ndarray}


def test_conversations_without_the_recordings_are_left_out_and_counted(codes, tmp_path):
    path = write_chats(tmp_path, {"talk": exchange("talk#0"), "chat": exchange("chat#0", "chat#1")})
    examples = Examples("chat", layout(), TOKENIZER, TemplateOptions(modes=["S-S"]), codes=[codes], chats=[path])
    assert len(list(examples)) == 1
    assert examples.counts["unspoken"] == 1 and examples.counts["examples"] == 2


def test_turns_whose_recording_is_in_quarantine_or_in_chunks_stay_written(tmp_path):
    source = write_codes(tmp_path / "codes", [("chat#0", "fox", random_codes(3)), ("long#1#0", "", random_codes(3))])
    (tmp_path / "codes.jsonl").write_text(
        (tmp_path / "codes.jsonl").read_text().replace('{"id": "long#1#0"', '{"chunk": [0, 2], "id": "long#1#0"')
    )
    (tmp_path / "codes.quarantine.jsonl").write_text(
        '{"where": "m, line 2", "reason": "silence", "id": "chat#1"}\n{"where": "m, line 3", "reason": "not JSON"}\n'
    )
    path = write_chats(tmp_path, {"chat": exchange("chat#0", "chat#1"), "long": exchange("chat#0", "long#1")})
    examples = Examples(
        "chat", layout(), TOKENIZER, TemplateOptions(modes=["S-S", "S-T"]), codes=[source], chats=[path]
    )
    assert len(list(examples)) == 2 and examples.counts["S-T"] == 2 and examples.counts["unrecorded"] == 2
    spoken = Examples("chat", layout(), TOKENIZER, TemplateOptions(modes=["S-S"]), codes=[source], chats=[path])
    assert list(spoken) == [] and spoken.counts["unspoken"] == 2


def test_texts_are_read_one_after_the_other(tmp_path):
    path = write_texts(tmp_path, "fox", "dog")
    path.write_text(path.read_text() + "{\n")
    documents = iter(Examples("text_lm", layout(), TOKENIZER, TemplateOptions(), texts=[path]))
    assert TOKENIZER.decode(next(documents).ids) == "fox"  # so a corpus may be larger than memory
    with pytest.raises(DataError, match="line 3: not JSON"):
        list(documents)


def test_a_long_conversation_is_split_between_exchanges(tmp_path):
    messages = [{"role": "system", "content": "be kind"}, *exchange() * 6]
    path = write_chats(tmp_path, {"long": messages})
    whole = next(iter(Examples("chat", layout(), TOKENIZER, TemplateOptions(modes=["T-T"]), chats=[path])))
    options = TemplateOptions(modes=["T-T"], limit=LengthLimit(60, "split"))
    examples = Examples("chat", layout(), TOKENIZER, options, chats=[path])
    documents = list(examples)
    system = 1 + 1 + len("be kind")
    assert len(whole) > 61 >= max(map(len, documents)) and examples.counts["cut"] == 1
    for document in documents:
        np.testing.assert_array_equal(document.ids[:system], whole.ids[:system])
    np.testing.assert_array_equal(np.concatenate([d.ids[system:] for d in documents]), whole.ids[system:])
    rejected = Examples("chat", layout(), TOKENIZER, limited(60), chats=[path])
    assert list(rejected) == [] and rejected.counts["rejected"] == 1


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("{", "line 2: not JSON"),
        ('{"messages": 3}', "line 2: must be a JSON object with a list of messages"),
        ('{"messages": []}', "must be of user and assistant in turn, found none"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "in turn, found user"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "line 2: message 1: role='robot': must be system, user"),
        ('{"messages": [{"role": "user", "content": " "}]}', "message 1: content=' ': must be a text"),
        ('{"messages": [{"role": "user", "content": "a", "audio": 1}]}', "audio=1: must be the id of an utterance"),
        (json.dumps({"id": "one", "messages": exchange()}), "id 'one' is already that of another line"),
        (json.dumps({"messages": exchange("gone#1")}), "chats:2: utterance 'gone#1' is in none of the codes"),
    ],
)
def test_broken_conversations_are_named(tmp_path, line, rule):
    path = write_chats(tmp_path, {"one": exchange()})
    path.write_text(path.read_text() + line)
    with pytest.raises(DataError, match=rule):
        list(Examples("chat", layout(), TOKENIZER, TemplateOptions(), chats=[path]))


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"wordings": 0}, "wordings=0: must be at least 1"),
        ({"loss": "some"}, "loss='some': must be one of targets, everything"),
        ({"modes": ["S-X"]}, "modes='S-X': must be one of T-T, S-T, T-S, S-S"),
        ({"modes": []}, "must be at least one of"),
    ],
)
def test_wrong_options_are_refused(options, rule):
    with pytest.raises(ConfigError, match=rule):
        TemplateOptions(**options)


@pytest.mark.parametrize("task", POLICIES)
def test_policies_a_task_does_not_have_are_refused(task):
    for policy in ("reject", "chunk", "split"):
        options = limited(10, policy)
        if policy in POLICIES[task]:
            Examples(task, layout(), TOKENIZER, options)
            continue
        with pytest.raises(ConfigError, match=f"over_length='{policy}': must be reject.* for task={task}"):
            Examples(task, layout(), TOKENIZER, options)
    with pytest.raises(ConfigError, match="over_length='chunk': needs max_length"):
        Examples("text_lm", layout(), TOKENIZER, TemplateOptions(limit=LengthLimit(None, "chunk")))


@pytest.mark.parametrize("task", ["asr", "tts", "text_lm"])
def test_utterances_without_text_are_left_out_and_counted(tmp_path, task):
    source = write_codes(tmp_path / "codes", [("a", "fox", random_codes(3)), ("b", "", random_codes(3))])
    examples = Examples(task, layout(), TOKENIZER, TemplateOptions(), codes=[source])
    assert len(list(examples)) == 1 and examples.counts["textless"] == 1 and examples.counts["examples"] == 2
    assert len(list(Examples("speech_lm", layout(), TOKENIZER, TemplateOptions(), codes=[source]))) == 2


def test_wordings_vary_from_document_to_document(tmp_path):
    utterances = [(f"u{n}", "fox", random_codes(1)) for n in range(60)]
    source = write_codes(tmp_path / "codes", utterances)
    chats = write_chats(tmp_path, {f"c{n}": exchange(f"u{n}") for n in range(60)})

    def beginnings(task: str, purpose: str, wordings: int) -> Counter[str]:
        options = TemplateOptions(wordings=wordings, modes=["S-T"])
        examples = Examples(task, layout(), TOKENIZER, options, codes=[source], chats=[chats] if task == "chat" else [])
        texts = [TOKENIZER.decode(document.ids[document.ids < TOKENIZER.vocab_size]) for document in examples]
        plain = [TOKENIZER.decode(TOKENIZER.encode(wording)) for wording in INSTRUCTIONS[purpose]]
        return Counter(next(n for n, wording in enumerate(plain) if text.startswith(wording)) for text in texts)

    for task, purpose in (("asr", "asr"), ("tts", "tts"), ("chat", "answer_written")):
        assert beginnings(task, purpose, 1) == {0: 60}
        found = beginnings(task, purpose, 3)
        assert set(found) == {0, 1, 2} and min(found.values()) > 8
        assert found == beginnings(task, purpose, 3)


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b'{"messages": "\xff"}\n', "line 1: not UTF-8"),
        (b'{"a": "' + b"x" * 5000 + b'"}\n', "line 1: longer than"),
        (b"\n", "empty chat file"),
    ],
)
def test_hostile_chat_files_are_refused_by_line(tmp_path, monkeypatch, content, rule):
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 4096)
    (tmp_path / "chats.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=rule):
        list(read_chats(tmp_path / "chats.jsonl"))


def test_a_chat_file_may_be_compressed_and_begin_with_a_byte_order_mark_and_is_no_pipe(tmp_path):
    content = write_chats(tmp_path, {"one": exchange()}).read_bytes()
    (tmp_path / "chats.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + content))
    assert [chat.id for chat in read_chats(tmp_path / "chats.jsonl.gz")] == ["one"]
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="pipe.jsonl: not a regular file"):
        list(read_chats(tmp_path / "pipe.jsonl"))
