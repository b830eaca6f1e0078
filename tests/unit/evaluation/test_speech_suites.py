"""Evaluation suites: how much room an answer gets, what fails, and where the sound goes."""

from types import SimpleNamespace

import numpy as np
import pytest

from megatron_most.data.building.tasks import prompt
from megatron_most.data.preparation.manifest import Record
from megatron_most.errors import DataError
from megatron_most.evaluation.interface import EvaluatedModel
from megatron_most.evaluation.running import run_suite
from megatron_most.evaluation.suites.speech import AsrSuite, EvaluationSet, ReferenceAudioSuite, TtsSuite
from megatron_most.inference import Decoding, Sampling
from megatron_most.inference.generator import Row
from megatron_most.inference.grammar import speech_grammar
from tests.unit.data.tiny import LAYOUTS, LetterTokenizer, LoudnessCodec, layout, random_codes

CONTEXT = 100


def record(identity: str, text: str = "the fox") -> Record:
    return Record(identity, text, None, None, None)


class Deaf:
    """A recognizer that hears nothing."""

    name = "deaf"

    def transcribe(self, audio, sample_rate):
        return ""


class Endless:
    """A generator that never ends an answer; it refuses prompts that do not fit, as the real one does."""

    def __init__(self, vocab):
        self.vocab = vocab

    def grammar(self, make, *options):
        return make

    def rows(self, prompts, grammar, limits, sampling):
        assert all(len(one.ids) + limit <= CONTEXT for one, limit in zip(prompts, limits, strict=True))
        layout = self.vocab.codec_layout
        rows = []
        for limit in limits:
            ids, codes = np.full(limit, 3), np.full((limit, self.vocab.num_codebooks), -1)
            if grammar is speech_grammar:
                fitting = max(number for number in range(limit + 1) if layout.num_positions(number) <= limit)
                ids, codes = layout.encode(np.zeros((fitting, self.vocab.num_codebooks), dtype=np.int64))
            rows.append(Row(ids, codes, is_ended=False))
        return rows


@pytest.fixture(params=LAYOUTS)
def model(request):
    vocab = layout(request.param)
    config = SimpleNamespace(vocab=vocab, data=SimpleNamespace(seq_length=CONTEXT))
    parts = {"generator": Endless(vocab), "tokenizer": LetterTokenizer(), "codec": LoudnessCodec(), "stop_ids": ()}
    return EvaluatedModel(SimpleNamespace(config=config, **parts), {"name": "endless"})


def evaluate_asr(model, evaluated, codes, max_new=None):
    return run_suite(AsrSuite(evaluated, Decoding(max_new=max_new), codes), model)


def asr_prompt_length(model, num_frames: int) -> int:
    """bos, "Transcribe:" without its colon, begin and end of audio."""
    return 1 + len("Transcribe") + 2 + model.vocab.codec_layout.num_positions(num_frames)


def test_a_transcript_may_fill_the_room_beside_its_own_prompt(model):
    codes, evaluated = [random_codes(3), random_codes(11)], EvaluationSet("set", [record("a"), record("b")])
    result = evaluate_asr(model, evaluated, codes)
    rooms = [CONTEXT - asr_prompt_length(model, 3), CONTEXT - asr_prompt_length(model, 11)]
    assert [len(item["hypothesis"]) for item in result["items"]] == rooms
    assert [item["at_limit"] for item in result["items"]] == [True, True]
    assert result["num_at_limit"] == 2
    alone = evaluate_asr(model, EvaluationSet("set", [record("a")]), codes[:1])
    assert alone["items"] == result["items"][:1]
    bounded = evaluate_asr(model, evaluated, codes, max_new=5)
    assert [item["hypothesis"] for item in bounded["items"]] == ["a" * 5] * 2


def test_an_utterance_that_does_not_fit_fails_alone_and_counts_as_wrong(model):
    records = [record("a"), record("long", "three more words"), record("broken")]
    codes = [random_codes(3), random_codes(CONTEXT), DataError("broken.wav: no sound")]
    result = evaluate_asr(model, EvaluationSet("set", records, "basic"), codes)
    good, long, broken = result["items"]
    assert good == evaluate_asr(model, EvaluationSet("set", records[:1], "basic"), codes[:1])["items"][0]
    length = asr_prompt_length(model, CONTEXT)
    assert long["failed"] == (
        f"a prompt of {length} positions leaves no room for an answer: data.seq_length is {CONTEXT}"
    )
    assert broken["failed"] == "broken.wav: no sound"
    assert (long["hypothesis"], broken["hypothesis"]) == ("", "")
    assert (result["num_utterances"], result["num_failed"]) == (3, 2)
    # one word of two substituted and one deleted, or worse; all of the words of the others deleted
    assert result["wer"] == (2 + 3 + 2) / 7


def test_speech_fills_the_room_beside_its_own_text_and_fails_alone(model):
    texts = ["the fox", "a longer text", "x" * CONTEXT]
    evaluated = EvaluationSet("set", [record(text, text) for text in texts], "basic")
    result = run_suite(TtsSuite(evaluated, Deaf()), model)
    assert [("failed" in item, item.get("at_limit", False)) for item in result["items"]] == [
        (False, True),
        (False, True),
        (True, False),
    ]
    assert result["wer"] == 1.0


def test_sampled_speech_of_a_text_does_not_depend_on_the_texts_beside_it(model):
    ids = [prompt("tts", layout(), LetterTokenizer(), text=text).ids.tobytes() for text in ("the fox", "a dog")]
    cpu, sampling = "cpu", Sampling(temperature=1.0, seed=3)
    states = [sampling.generator(cpu, one).get_state() for one in (*ids, ids[0])]
    assert (states[0] == states[2]).all()
    assert (states[0] != states[1]).any()
    assert (states[0] != sampling.with_seed(4).generator(cpu, ids[0]).get_state()).any()


def test_a_set_of_which_nothing_can_be_evaluated_is_refused(model):
    with pytest.raises(DataError, match="set: no sample could be judged: no sound"):
        evaluate_asr(model, EvaluationSet("set", [record("a")]), [DataError("no sound")])
    with pytest.raises(DataError, match="set: no samples$"):
        evaluate_asr(model, EvaluationSet("set", []), [])


def test_sound_stays_in_its_folder_whatever_the_ids(tmp_path):
    samples = tmp_path / "run" / "samples"
    records = [record("../../up"), record("/etc/name"), record("käse 1"), record("heldout-0003")]
    codes = [random_codes(2)] * len(records)
    evaluated = EvaluationSet("../set", records, samples=samples, num_samples=4)
    result = run_suite(ReferenceAudioSuite(LoudnessCodec(), evaluated, Deaf(), codes), None)
    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.wav"))
    assert written == sorted(f"run/{item['roundtrip_wav']}" for item in result["items"])
    assert [item["roundtrip_wav"] for item in result["items"]] == [
        "samples/.._set_.._.._up_roundtrip.wav",
        "samples/.._set__etc_name_roundtrip.wav",
        "samples/.._set_käse_1_roundtrip.wav",
        "samples/.._set_heldout-0003_roundtrip.wav",
    ]


def test_results_name_their_normalizer_and_interval(model):
    evaluated = EvaluationSet("set", [record(str(index), "the fox") for index in range(4)])
    result = evaluate_asr(model, evaluated, [random_codes(3)] * 4, max_new=1)
    assert result["normalizer"] == "whisper-english"
    assert result["wer_interval"] == (1.0, 1.0)
