"""Templates: the ids and the loss mask of each task, and prompts that equal the beginning of documents."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_most.data.building.instructions import INSTRUCTIONS, choose_instruction
from megatron_most.data.building.special_tokens import special_tokens
from megatron_most.data.building.tasks import ChatTurn, make_chat, make_document, prompt
from megatron_most.data.storage.documents import TASKS
from megatron_most.errors import DataError
from megatron_most.vocab import NO_CODE, VocabLayout
from tests.unit.data.tiny import (
    CODEBOOK_SIZE,
    CODEBOOKS,
    LAYOUTS,
    LetterTokenizer,
    example_document,
    layout,
    random_codes,
)

TOKENIZER = LetterTokenizer()
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id


def expected_ids(vocab: VocabLayout, task: str, text: str, codes: np.ndarray) -> tuple[list[int], int]:
    """The ids of the template, and the length of its prompt."""
    frames = vocab.codec_layout.encode(codes)[0].tolist()
    audio = [vocab.begin_of_audio, *frames, vocab.end_of_audio]
    if task == "asr":
        before = [BOS, *TOKENIZER.encode("Transcribe:"), *audio]
        return [*before, *TOKENIZER.encode(text), EOS], len(before)
    if task == "tts":
        before = [BOS, *TOKENIZER.encode(f"Say: {text}"), vocab.begin_of_audio]
        return [*before, *frames, vocab.end_of_audio, EOS], len(before)
    if task == "speech_lm":
        return [BOS, *audio, EOS], 2
    if task == "interleaved":
        return [BOS, *TOKENIZER.encode(text), *audio, EOS], 1
    return [BOS, *TOKENIZER.encode(text), EOS], 1


@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize("task", [task for task in TASKS if task != "chat"])
def test_documents_follow_the_template(task, layout_name):
    vocab, codes = layout(layout_name), random_codes(4)
    document = example_document(task, vocab, " red fox ", codes)
    ids, prompt_length = expected_ids(vocab, task, "red fox", codes)
    assert document.ids.tolist() == ids
    assert document.loss_mask.tolist() == [position >= prompt_length for position in range(len(ids))]
    if layout_name.startswith("flat"):
        assert document.side_codes is None
    else:
        is_frame = vocab.codec_layout.holds_side_codes(document.ids)
        assert (document.side_codes[~is_frame] == NO_CODE).all()
        assert (document.ids == vocab.frame).sum() == (0 if task == "text_lm" else 4)
        if task != "text_lm":
            np.testing.assert_array_equal(document.side_codes[is_frame], vocab.codec_layout.encode(codes)[1])


@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize("task", ["asr", "tts", "speech_lm"])
def test_a_prompt_is_what_the_document_has_before_its_loss(task, layout_name):
    vocab, codes = layout(layout_name), random_codes(3)
    document = make_document(task, vocab, TOKENIZER, text="red fox", codes=codes)
    given_part = {"asr": {"codes": codes}, "tts": {"text": "red fox"}, "speech_lm": {}}[task]
    start = prompt(task, vocab, TOKENIZER, **given_part)
    length = len(start)
    assert not start.loss_mask.any() and document.loss_mask[length:].all()
    np.testing.assert_array_equal(start.ids, document.ids[:length])
    if document.side_codes is not None:
        np.testing.assert_array_equal(start.side_codes, document.side_codes[:length])


@given(
    codes=st.lists(st.tuples(*[st.integers(0, CODEBOOK_SIZE - 1)] * CODEBOOKS), min_size=1, max_size=12),
    layout_name=st.sampled_from(LAYOUTS),
    task=st.sampled_from(["asr", "tts"]),
)
def test_codes_come_back_out_of_a_document(codes, layout_name, task):
    vocab = layout(layout_name)
    codes = np.array(codes)
    document = make_document(task, vocab, TOKENIZER, text="fox", codes=codes)
    audio = document.ids >= vocab.frame
    side_codes = document.side_codes[audio] if document.side_codes is not None else None
    np.testing.assert_array_equal(vocab.codec_layout.decode(document.ids[audio], side_codes), codes)


def test_a_prompt_uses_the_codebooks_of_the_layout():
    vocab, codes = VocabLayout(40, 2, CODEBOOK_SIZE), random_codes(3)
    np.testing.assert_array_equal(prompt("asr", vocab, TOKENIZER, codes=codes).codes, codes[:, :2])


def test_each_turn_of_a_conversation_draws_its_own_wording():
    turns = [ChatTurn("user", "fox", random_codes(1)), ChatTurn("assistant", "dog")] * 12
    text = TOKENIZER.decode(make_chat(layout(), TOKENIZER, turns, key="chat", wordings=4).ids)
    wordings = [TOKENIZER.decode(TOKENIZER.encode(wording)) for wording in INSTRUCTIONS["answer_written"]]
    assert sum(wording in text for wording in wordings) > 1


def test_a_text_prompt_may_be_continued():
    start = prompt("text_lm", layout(), TOKENIZER, text="the fox")
    assert start.ids.tolist() == [BOS, *TOKENIZER.encode("the fox")]
    assert prompt("text_lm", layout(), TOKENIZER).ids.tolist() == [BOS]


@pytest.mark.parametrize(
    ("task", "arguments", "rule"),
    [
        ("asr", {"text": "fox"}, "needs audio of at least one codec frame"),
        ("tts", {"text": "fox", "codes": np.zeros((0, CODEBOOKS), dtype=np.int64)}, "at least one codec frame"),
        ("tts", {"text": "  ", "codes": random_codes(2)}, "text is empty"),
        ("asr", {"text": "fox", "codes": np.full((2, CODEBOOKS), CODEBOOK_SIZE)}, "code 50 of codebook 0, frame 0"),
        ("asr", {"text": "fox", "codes": np.zeros((2, 2), dtype=np.int64)}, r"shape \[2, 2\]"),
        ("text_lm", {"text": "fox", "codes": random_codes(2)}, "takes no codes"),
        ("sing", {"text": "fox"}, "task='sing': must be one of"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(task, arguments, rule):
    with pytest.raises(DataError, match=f"line 7: .*{rule}"):
        make_document(task, layout(), TOKENIZER, where="line 7", **arguments)


def test_text_ids_beyond_the_layout_are_refused():
    with pytest.raises(DataError, match="text id 23 is outside the layout's 20 text ids"):
        make_document("text_lm", VocabLayout(20, CODEBOOKS, CODEBOOK_SIZE), TOKENIZER, text="ut")


@pytest.mark.parametrize("task", TASKS)
def test_the_loss_may_be_on_everything_after_the_first_id(task):
    document = example_document(task, layout(), "red fox", random_codes(3), loss="everything")
    assert document.loss_mask.tolist() == [False] + [True] * (len(document) - 1)
    targets = example_document(task, layout(), "red fox", random_codes(3))
    np.testing.assert_array_equal(document.ids, targets.ids)


def test_the_wording_of_an_instruction_depends_on_the_document_alone():
    chosen = [choose_instruction("asr", f"utterance {n}", 4) for n in range(400)]
    assert chosen == [choose_instruction("asr", f"utterance {n}", 4) for n in range(400)]
    counts = [chosen.count(wording) for wording in INSTRUCTIONS["asr"]]
    assert all(60 < count < 140 for count in counts[:4]) and not any(counts[4:])
    assert {choose_instruction("asr", str(n), 1) for n in range(9)} == {"Transcribe:"}
    document = make_document("asr", layout(), TOKENIZER, text="a", codes=random_codes(1), instruction=chosen[0])
    assert document.ids[1 : 1 + len(TOKENIZER.encode(chosen[0]))].tolist() == TOKENIZER.encode(chosen[0])


SPEECH = {"user": random_codes(2, seed=1), "assistant": random_codes(3, seed=2)}


@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize(
    ("mode", "instruction"),
    [("TT", ""), ("ST", "Answer in writing."), ("TS", "Answer aloud."), ("SS", "Answer aloud.")],
)
def test_conversations_follow_the_template(layout_name, mode, instruction):
    vocab = layout(layout_name)
    table = special_tokens(vocab, TOKENIZER, roles=True)
    roles = ("user", "assistant")
    turns = [
        ChatTurn(role, "red fox", SPEECH[role] if kind == "S" else None) for role, kind in zip(roles, mode, strict=True)
    ]
    document = make_chat(vocab, TOKENIZER, [ChatTurn("system", "be kind"), *turns, *turns])

    def content(role, kind, suffix=""):
        if kind == "T":
            return TOKENIZER.encode("red fox" + suffix)
        frames = vocab.codec_layout.encode(SPEECH[role])[0].tolist()
        return [vocab.begin_of_audio, *frames, vocab.end_of_audio, *TOKENIZER.encode(suffix)]

    question = [table["user"], *content("user", mode[0], instruction), table["assistant"]]
    answer = [*content("assistant", mode[1]), EOS]
    start = [BOS, table["system"], *TOKENIZER.encode("be kind")]
    assert document.ids.tolist() == start + (question + answer) * 2
    lengths = [len(start) + len(question), len(answer), len(question), len(answer)]
    assert document.loss_mask.tolist() == np.repeat([False, True, False, True], lengths).tolist()


@pytest.mark.parametrize("answer", ["spoken", "written"])
def test_a_conversation_so_far_is_the_beginning_of_its_document(answer):
    codes = random_codes(3) if answer == "spoken" else None
    question = [ChatTurn("user", "red fox", random_codes(2))]
    document = make_chat(layout(), TOKENIZER, [*question, ChatTurn("assistant", "dog", codes)])
    start = make_chat(layout(), TOKENIZER, question, answer=answer)
    np.testing.assert_array_equal(start.ids, document.ids[: len(start)])
    assert start.ids[-1] == (layout().begin_of_audio if answer == "spoken" else document.ids[len(start) - 1])
    np.testing.assert_array_equal(start.side_codes, document.side_codes[: len(start)])
    assert document.loss_mask[len(start) :].all()
