"""Templates: what a document of each task holds, where its loss is, and that prompts are its beginning."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_most.data.tasks import TASKS, make_document, prompt
from megatron_most.errors import DataError
from megatron_most.vocab import NO_CODE, VocabLayout
from tests.unit.data.tiny import CODEBOOK_SIZE, CODEBOOKS, LAYOUTS, LetterTokenizer, layout, random_codes

TOKENIZER = LetterTokenizer()
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id


def expected_ids(vocab: VocabLayout, task: str, text: str, codes: np.ndarray) -> tuple[list[int], int]:
    """The template written out, and how many of its ids are the prompt."""
    frames = vocab.codec_layout.encode(codes)[0].tolist()
    audio = [vocab.begin_of_audio, *frames, vocab.end_of_audio]
    if task == "asr":
        before = [BOS, *TOKENIZER.encode("Transcribe:"), *audio]
        return [*before, *TOKENIZER.encode(text), EOS], len(before)
    if task == "tts":
        before = [BOS, *TOKENIZER.encode(f"Say: {text}"), vocab.begin_of_audio]
        return [*before, *frames, vocab.end_of_audio, EOS], len(before)
    return [BOS, *TOKENIZER.encode(text), EOS], 1


@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize("task", TASKS)
def test_documents_follow_the_template(task, layout_name):
    vocab, codes = layout(layout_name), random_codes(4)
    document = make_document(task, vocab, TOKENIZER, text=" red fox ", codes=None if task == "text_lm" else codes)
    ids, prompt_length = expected_ids(vocab, task, "red fox", codes)
    assert document.ids.tolist() == ids
    assert document.loss_mask.tolist() == [position >= prompt_length for position in range(len(ids))]
    if layout_name == "flat":
        assert document.codes is None
    else:
        is_frame = document.ids == vocab.frame
        assert (document.codes[~is_frame] == NO_CODE).all()
        assert is_frame.sum() == (0 if task == "text_lm" else 4)
        if task != "text_lm":
            np.testing.assert_array_equal(document.codes[is_frame].T, codes)


@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize("task", ["asr", "tts"])
def test_a_prompt_is_what_the_document_has_before_its_loss(task, layout_name):
    vocab, codes = layout(layout_name), random_codes(3)
    document = make_document(task, vocab, TOKENIZER, text="red fox", codes=codes)
    given_part = {"text": "red fox"} if task == "tts" else {"codes": codes}
    start = prompt(task, vocab, TOKENIZER, **given_part)
    length = len(start)
    assert not start.loss_mask.any() and document.loss_mask[length:].all()
    np.testing.assert_array_equal(start.ids, document.ids[:length])
    if document.codes is not None:
        np.testing.assert_array_equal(start.codes, document.codes[:length])


@given(
    codes=st.lists(st.tuples(*[st.integers(0, CODEBOOK_SIZE - 1)] * CODEBOOKS), min_size=1, max_size=12),
    layout_name=st.sampled_from(LAYOUTS),
    task=st.sampled_from(["asr", "tts"]),
)
def test_codes_come_back_out_of_a_document(codes, layout_name, task):
    vocab = layout(layout_name)
    codes = np.array(codes).T
    document = make_document(task, vocab, TOKENIZER, text="fox", codes=codes)
    audio = document.ids >= vocab.frame
    side_codes = document.codes[audio] if document.codes is not None else None
    np.testing.assert_array_equal(vocab.codec_layout.decode(document.ids[audio], side_codes), codes)


def test_a_text_prompt_may_be_continued():
    start = prompt("text_lm", layout(), TOKENIZER, text="the fox")
    assert start.ids.tolist() == [BOS, *TOKENIZER.encode("the fox")]
    assert prompt("text_lm", layout(), TOKENIZER).ids.tolist() == [BOS]


@pytest.mark.parametrize(
    ("task", "arguments", "rule"),
    [
        ("asr", {"text": "fox"}, "needs audio of at least one codec frame"),
        ("tts", {"text": "fox", "codes": np.zeros((CODEBOOKS, 0), dtype=np.int64)}, "at least one codec frame"),
        ("tts", {"text": "  ", "codes": random_codes(2)}, "text is empty"),
        ("asr", {"text": "fox", "codes": np.full((CODEBOOKS, 2), CODEBOOK_SIZE)}, "code 50 of codebook 0, frame 0"),
        ("asr", {"text": "fox", "codes": np.zeros((2, 2), dtype=np.int64)}, r"shape \[2, 2\]"),
        ("text_lm", {"text": "fox", "codes": random_codes(2)}, "takes no codes"),
        ("chat", {"text": "fox"}, "unknown task 'chat'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(task, arguments, rule):
    with pytest.raises(DataError, match=f"line 7: .*{rule}"):
        make_document(task, layout(), TOKENIZER, where="line 7", **arguments)


def test_text_ids_beyond_the_layout_are_refused():
    with pytest.raises(DataError, match="text id 23 is outside the layout's 20 text ids"):
        make_document("text_lm", VocabLayout(20, CODEBOOKS, CODEBOOK_SIZE), TOKENIZER, text="ut")
