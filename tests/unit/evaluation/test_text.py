"""Perplexity and bits per byte of text."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from megatron_most.data.building.text_windows import windows
from megatron_most.errors import DataError
from megatron_most.evaluation.running import run_suite
from megatron_most.evaluation.suites.text import TextSuite
from tests.unit.data.tiny import LAYOUTS, LetterTokenizer, layout
from tests.unit.evaluation.stubs import StubModel


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 20])
def test_windows_predict_every_token_once_from_as_much_as_fits(name, count):
    ids, context = list(range(3, 3 + count)), 8
    predicted: list[int] = []
    for document in windows(layout(name), ids, 1, context):
        assert len(document) - 1 <= context and (document.side_codes is None or (document.side_codes == -1).all())
        before = document.ids[~document.loss_mask].tolist()
        expected = [1, *ids][len(predicted) + 1 - len(before) : len(predicted) + 1]
        assert before == expected
        predicted += document.ids[document.loss_mask].tolist()
        assert len(document) - 1 == min(context, count)
    assert predicted == ids


def test_bits_per_byte_and_perplexity_are_what_they_say(tmp_path):
    text = "the quick brown fox jumps over the lazy dog " * 3
    (tmp_path / "fox.txt").write_text(text)
    model = StubModel(lambda document: -math.log(8), context=32)
    result = run_suite(TextSuite(tmp_path / "fox.txt"), model)
    tokens = len(LetterTokenizer().encode(text))
    assert (result["num_tokens"], result["num_bytes"]) == (tokens, len(text))
    assert result["perplexity"] == pytest.approx(8)
    assert result["score"] == pytest.approx(3 * tokens / len(text))
    assert result["whole"]["perplexity"] == pytest.approx(8 * math.e)  # the stub's is one nat less likely
    assert result["lower_is_better"] and result["num_samples"] == -(-tokens // 32)


def test_texts_of_a_manifest_are_documents_of_their_own(tmp_path):
    texts = ["one", "two three", "käse"]
    lines = [json.dumps({"id": str(place), "text": text}) for place, text in enumerate(texts)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    seen = []
    model = StubModel(lambda document: seen.append(document.ids.tolist()) or -1.0)
    result = run_suite(TextSuite(tmp_path / "texts.jsonl"), model)
    assert seen == [[1, *LetterTokenizer().encode(text)] for text in texts]
    assert result["num_bytes"] == sum(len(text.encode()) for text in texts)
    low, high = result["interval"]
    assert low <= result["score"] <= high


def test_text_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(DataError, match="absent.txt: no such file"):
        TextSuite(tmp_path / "absent.txt")
    (tmp_path / "bytes.txt").write_bytes(np.arange(256, dtype=np.uint8).tobytes())
    with pytest.raises(DataError, match="bytes.txt: must be UTF-8 text"):
        TextSuite(tmp_path / "bytes.txt")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="empty.txt: text is empty"):
        run_suite(TextSuite(tmp_path / "empty.txt"), StubModel())
