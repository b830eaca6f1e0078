"""Inspection: hours, modalities, lengths and duplicates, and documents with several audio segments."""

import numpy as np

from megatron_most.data.building.tasks import ChatTurn, make_chat
from megatron_most.data.storage.inspection import audio_of, describe, histogram, num_duplicates, statistics, totals
from megatron_most.data.storage.token_dataset import DatasetWriter, TokenDataset
from tests.unit.data.tiny import LetterTokenizer, LoudnessCodec, example_document, layout, random_codes, write_dataset

CODEC = {"name": "loudness", "frame_rate": 80.0, "sample_rate": 8000, "num_codebooks": 3}
assert LoudnessCodec.frame_rate == CODEC["frame_rate"]


def provenance(frames: int, codec: dict | None = CODEC) -> dict:
    return {"codec": codec, "counts": {"documents": 1, "positions": 2, "target_positions": 1, "audio_frames": frames}}


def test_hours_and_shares_are_those_of_the_documents(tmp_path):
    dataset = write_dataset(tmp_path / "data", "tts", 40, provenance=provenance(80 * 3600))
    text = "\n".join(statistics(dataset))
    assert "audio: 1.00 h at 8000 Hz, 80 frames/s, first 3 of 3 codebooks, codec loudness" in text
    total, audio = sum(dataset.input_positions.values()), dataset.input_positions["audio"]
    assert f"input positions: {total}: text {total - audio} " in text and f"audio {audio} ({audio / total:.1%})" in text
    assert f"maximum {dataset.lengths.max()}" in text


def test_totals_are_sums_by_task(tmp_path):
    datasets = [
        write_dataset(tmp_path / "a", "tts", 4, provenance=provenance(80 * 3600)),
        write_dataset(tmp_path / "b", "tts", 3, provenance=provenance(40 * 3600)),
        write_dataset(tmp_path / "c", "text_lm", 5, provenance=provenance(0, None)),
    ]
    header, *rows = [line.split() for line in totals(datasets)]
    assert header == ["task", "documents", "hours", "text", "audio"]
    assert [row[:3] for row in rows] == [["tts", "7", "1.50"], ["text_lm", "5", "0.00"], ["all", "12", "1.50"]]
    assert int(rows[2][3]) == sum(dataset.input_positions["text"] for dataset in datasets)


def test_duplicates_have_equal_ids_and_codes(tmp_path):
    vocab = layout()
    codes = random_codes(3)
    with DatasetWriter(tmp_path / "data", "tts", vocab) as writer:
        for text, what in (("a", codes), ("b", codes), ("a", codes + 0), ("a", 49 - codes), ("a", codes)):
            writer.add(example_document("tts", vocab, text, what))
        writer.commit({})
    assert num_duplicates(TokenDataset(tmp_path / "data")) == 2


def test_the_histogram_counts_every_document_once():
    lengths = np.random.default_rng(0).integers(5, 900, 1000)
    lines = histogram(lengths)
    assert len(lines) == 16 and sum(int(line.split()[-1]) for line in lines) == 1000
    assert max(line.count("#") for line in lines) == 50
    assert histogram(np.array([7, 7])) == ["7..7 " + "#" * 50 + " 2"]


def test_a_conversation_is_told_turn_by_turn_with_each_of_its_recordings():
    vocab, spoken = layout("flat_delay"), [random_codes(4, seed=1), random_codes(2, seed=2)]
    turns = [ChatTurn("user", "the fox", spoken[0]), ChatTurn("assistant", "a dog", spoken[1])]
    document = make_chat(vocab, LetterTokenizer(), turns)
    assert describe(document, vocab, LetterTokenizer()) == "<4 frames> answer aloud [<2 frames>]"
    for found, codes in zip(audio_of(document, vocab), spoken, strict=True):
        np.testing.assert_array_equal(found, codes)
