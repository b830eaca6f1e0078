"""Evaluation suites: how much room an answer gets, and where the sound goes."""

from types import SimpleNamespace

import pytest

from megatron_most.data.preparation.manifest import Record
from megatron_most.evaluation import suites
from tests.unit.data.tiny import LAYOUTS, LetterTokenizer, LoudnessCodec, layout, random_codes


def record(identity: str) -> Record:
    return Record(identity, "the fox", None, None, None)


class Deaf:
    """A recognizer that hears nothing."""

    def transcribe(self, audio, sample_rate):
        return ""


@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_a_transcript_may_fill_the_room_beside_the_longest_prompt(monkeypatch, layout_name):
    asked = []
    monkeypatch.setattr(suites, "transcribe", lambda model, codes, max_new: asked.append(max_new) or ["the fox"] * 2)
    vocab, tokenizer = layout(layout_name), LetterTokenizer()
    model = SimpleNamespace(
        tokenizer=tokenizer, config=SimpleNamespace(vocab=vocab, data=SimpleNamespace(seq_length=100))
    )
    codes = [random_codes(3), random_codes(11)]
    suites.evaluate_asr(model, "set", [record("a"), record("b")], codes, max_new=1000)
    # bos, "Transcribe:" without its colon, begin and end of audio
    prompt_length = 1 + len("Transcribe") + 2 + vocab.codec_layout.num_positions(11)
    assert asked == [100 - prompt_length]
    suites.evaluate_asr(model, "set", [record("a"), record("b")], codes, max_new=5)
    assert asked[1] == 5


def test_sound_stays_in_its_folder_whatever_the_ids(tmp_path):
    samples = tmp_path / "run" / "samples"
    records = [record("../../up"), record("/etc/name"), record("käse 1"), record("heldout-0003")]
    codes = [random_codes(2)] * len(records)
    result = suites.evaluate_reference_audio(
        LoudnessCodec(), "../set", records, Deaf(), codes, samples=samples, num_samples=4
    )
    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.wav"))
    assert written == sorted(f"run/{item['roundtrip_wav']}" for item in result["items"])
    assert [item["roundtrip_wav"] for item in result["items"]] == [
        "samples/.._set_.._.._up_roundtrip.wav",
        "samples/.._set__etc_name_roundtrip.wav",
        "samples/.._set_käse_1_roundtrip.wav",
        "samples/.._set_heldout-0003_roundtrip.wav",
    ]
