"""What each section shows, from run files made for the case."""

import base64
import json
import random

import pytest

from megatron_most.data.storage.documents import TASKS
from megatron_most.report.curves import loss_charts, points_of, training_charts
from megatron_most.report.run_files import RunFiles, read_run
from megatron_most.report.samples import MAX_SAMPLES, speech_samples
from megatron_most.report.scores import suite_scores
from megatron_most.report.transcripts import Rate, error_rates, transcript_tables
from tests.unit.report.fake_run import make_run, write_tone


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "whole", steps=200)


def run_with(tmp_path, **values) -> RunFiles:
    return RunFiles(tmp_path, **values)


def test_a_key_absent_in_a_line_has_no_point_and_the_later_line_counts():
    metrics = [{"step": 1, "loss": 3.0}, {"step": 2}, {"step": 3, "loss": float("nan")}, {"step": 1, "loss": 2.0}]
    assert points_of(metrics, "loss") == [(1, 2.0)]


def test_curves_are_grouped_and_validation_takes_its_tasks_color(whole):
    charts = {chart.title: chart for chart in loss_charts(read_run(whole).metrics, ["text", "audio"])}
    assert list(charts) == ["Loss by modality", "Loss by task", "Cross entropy by codebook"]
    by_task = {curve.series.label: curve.series for curve in charts["Loss by task"].curves}
    assert by_task["heldout_s_asr (validation)"].color == by_task["ASR"].color != by_task["TTS"].color
    assert by_task["heldout_s_asr (validation)"].marker != by_task["heldout_p_asr (validation)"].marker
    assert by_task["heldout_s_asr (validation)"].dash
    assert not by_task["ASR"].dash
    assert len(charts["Cross entropy by codebook"].curves) == 4
    titles = [chart.title for chart in training_charts(read_run(whole).metrics)]
    assert titles == [
        "Learning rate",
        "Gradient norm, before clipping",
        "Throughput",
        "Peak memory of rank 0",
        "Time of a step",
    ]


def test_text_retention_is_drawn_where_it_is_logged():
    measured = [{"step": step, "retention/bits_per_byte": 1.5 + step} for step in (0, 5)]
    (chart,) = loss_charts([*measured, {"step": 9}], ["text", "audio"])
    assert chart.title == "Text retention"
    assert [curve.series.points for curve in chart.curves] == [[(0, 1.5), (5, 6.5)]]


def test_a_validation_set_of_no_known_task_has_a_curve_too():
    (chart,) = loss_charts([{"step": 5, "validation/books/loss": 2.0, "validation/books/loss/text": 9.0}], ["text"])
    assert [curve.series.label for curve in chart.curves] == ["books (validation)"]


def test_transcripts_mark_every_kind_of_error_and_put_the_worst_first(tmp_path):
    items = [
        {"id": "fine", "reference": "one two", "hypothesis": "One two."},
        {"id": "some", "reference": "a b c", "hypothesis": "a x c"},
        {"id": "worst", "reference": "a b c d", "hypothesis": "b c d e f"},
    ]
    run = run_with(tmp_path, evaluation={"asr": {"suite": "asr", "set": "s", "wer": 0.44, "items": items}})
    (table,) = transcript_tables(run)
    assert [one.id for one in table.shown] == ["worst", "some", "fine"]
    assert [(edit.kind, edit.reference, edit.hypothesis) for edit in table.shown[0].edits] == [
        ("delete", ("a",), ()),
        ("equal", ("b", "c", "d"), ("b", "c", "d")),
        ("insert", (), ("e", "f")),
    ]
    assert (table.errors.substitutions, table.errors.deletions, table.errors.insertions) == (1, 1, 2)
    assert (table.num_utterances, table.num_with_errors) == (3, 2)
    assert table.rate == Rate(0.44, 3)


def test_error_rates_stand_by_set_and_suite():
    run = run_with(
        None,
        evaluation={
            "a": {"suite": "asr", "set": "hard", "wer": 0.2, "num_utterances": 7, "items": []},
            "b": {"suite": "asr", "set": "easy", "wer": 0.0, "items": [{}, {}]},
            "c": {"suite": "tts", "set": "easy", "wer": 0.1, "num_utterances": 5, "wer_interval": [0.05, 0.2]},
            "d": {"suite": "mine", "set": "easy", "wer": None},
        },
    )
    easy, hard = [Rate(0.0, 2), Rate(0.1, 5, (0.05, 0.2))], [Rate(0.2, 7), None]
    assert error_rates(run) == (["asr", "tts"], [("easy", easy), ("hard", hard)])


def test_utterances_that_cannot_be_aligned_are_noted(tmp_path):
    empty = {"suite": "asr", "set": "s", "wer": 0.0, "items": [{"id": 1, "reference": "", "hypothesis": "x"}]}
    run = run_with(tmp_path, evaluation={"empty": empty, "bare": {"suite": "tts", "items": [3]}})
    assert transcript_tables(run) == []
    assert len(run.notes) == 2


def test_samples_carry_their_sound(whole):
    run = read_run(whole)
    samples = speech_samples(run)
    assert [(sample.set_name, sample.id) for sample in samples] == [
        ("heldout_s", "heldout_s_000"),
        ("heldout_s", "heldout_s_001"),
        ("heldout_p", "heldout_p_000"),
        ("heldout_p", "heldout_p_001"),
    ]
    assert list(samples[0].sounds) == ["original_wav", "roundtrip_wav", "generated_wav"]
    sound = samples[0].sounds["generated_wav"].removeprefix("data:audio/wav;base64,")
    assert base64.b64decode(sound) == (whole / "samples" / "heldout_s_0_generated.wav").read_bytes()
    assert samples[0].heard == "the small count seven red stones"
    assert run.notes == []


def test_sounds_of_one_utterance_come_together_from_several_suites(tmp_path):
    for kind in ("original", "generated"):
        write_tone(tmp_path / f"{kind}.wav", 300, random.Random(1), seconds=0.1)
    run = run_with(
        tmp_path,
        evaluation={
            suite: {"suite": suite, "set": "s", "items": [{"id": "u", "reference": "a", f"{kind}_wav": f"{kind}.wav"}]}
            for suite, kind in (("original", "original"), ("tts", "generated"))
        },
    )
    (sample,) = speech_samples(run)
    assert set(sample.sounds) == {"original_wav", "generated_wav"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../outside.wav", "is outside of the run directory"),
        ("absent.wav", "no such file"),
        ("text.wav", "is not a WAV"),
    ],
)
def test_sound_that_cannot_be_used_is_noted(tmp_path, name, reason):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    write_tone(tmp_path / "outside.wav", 300, random.Random(1), seconds=0.1)
    (run_dir / "text.wav").write_text("no sound")
    run = run_with(run_dir, evaluation={"tts": {"set": "s", "items": [{"id": "u", "generated_wav": name}]}})
    assert speech_samples(run) == []
    assert any(reason in note for note in run.notes)


def test_the_number_of_samples_is_bounded_and_every_set_keeps_some(tmp_path):
    write_tone(tmp_path / "a.wav", 300, random.Random(1), seconds=0.1)
    items = [{"id": str(index), "reference": "a", "generated_wav": "a.wav"} for index in range(20)]
    run = run_with(tmp_path, evaluation={name: {"set": name, "items": json.loads(json.dumps(items))} for name in "xy"})
    samples = speech_samples(run)
    assert len(samples) == MAX_SAMPLES
    assert [sample.set_name for sample in samples].count("x") == MAX_SAMPLES // 2
    assert f"{MAX_SAMPLES} of 40 utterances with sound are on this page, to keep it small." in run.notes


def test_the_size_of_the_sound_is_bounded(tmp_path):
    (tmp_path / "long.wav").write_bytes(b"RIFF....WAVE" + bytes(2_000_000))
    items = [{"id": str(index), "reference": "a", "generated_wav": "long.wav"} for index in range(3)]
    run = run_with(tmp_path, evaluation={"tts": {"set": "s", "items": items}})
    assert len(speech_samples(run)) == 1
    assert any(note.startswith("1 of 3 utterances") for note in run.notes)


def test_every_task_that_data_can_have_has_a_curve():
    (chart,) = loss_charts([{"step": 1, **{f"loss/{task}": 1.0 for task in TASKS}}], [])
    assert len(chart.curves) == len({curve.series.color for curve in chart.curves}) == len(TASKS)


def test_suites_without_word_error_rates_have_a_table_of_their_own(tmp_path):
    known = {"interval": [0.5, 0.75], "num_samples": 1200, "num_failed": 3}
    run = run_with(
        tmp_path,
        evaluation={
            "swuggy": {"suite": "swuggy", "set": "lexical/dev", "metric": "accuracy", "score": 0.625, **known},
            "text": {"suite": "text", "set": "books", "metric": "bits_per_byte", "score": 1.25, "interval": None},
            "asr_a": {"suite": "asr", "set": "a", "wer": 0.5, "metric": "wer", "score": 0.5, "items": []},
        },
    )
    first, second = suite_scores(run)
    assert (first.value, first.interval, first.samples, first.failed) == ("62.5%", "50.0% to 75.0%", "1,200", 3)
    assert (second.metric, second.value, second.interval) == ("bits per byte", "1.2500", "")
    assert transcript_tables(run) == []
    assert run.notes == ["evaluation/asr_a.json lists no utterances."]
