"""One run's books: a result or a failure, once."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_most import checkpointing, cli
from megatron_most.config import CONFIG, dump_config
from megatron_most.sweep.job import FAILURE, LOG, RESULT, STOPPED, Job, Programs, lock
from megatron_most.sweep.spec import EvaluationConfig, ResourcesConfig
from tests.distributed.tiny import tiny_config

PROGRAMS = Programs(["train.sh"], ["train_node.sh"], ["python", "evaluate.py"])


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """What would be executed; the statuses are those of ``calls.statuses``, 0 when it is empty.

    Training leaves a checkpoint of step ``calls.reached``, of 6.
    """

    class Calls(list):
        statuses: list[int] = []
        reached = 6

    found = Calls()
    (tmp_path / CONFIG).write_text(dump_config(tiny_config(training__train_iters=6, run_dir=tmp_path)))

    def call(job: Job, command: list[str], log: Path, environment: dict, descriptors: tuple) -> int:
        found.append(command)
        log.write_text("some line\nerror: model.hidden_size=3: must be even\nSignal caught\n")
        return found.statuses.pop(0) if found.statuses else 0

    monkeypatch.setattr(Job, "_call", call)
    monkeypatch.setattr(checkpointing, "read_metadata", lambda directory: SimpleNamespace(step=found.reached))
    monkeypatch.delenv("SLURM_NODEID", raising=False)
    return found


def make(directory: Path, *evaluation: EvaluationConfig) -> Job:
    return Job(str(directory), "abc", ResourcesConfig(), list(evaluation), PROGRAMS)


def test_a_normalizer_is_named_only_if_the_sweep_names_one(tmp_path, calls):
    make(tmp_path, EvaluationConfig("asr", "a.jsonl"), EvaluationConfig("asr", "b.jsonl", normalizer="basic"))()
    assert "--normalizer" not in calls[1]
    assert calls[2][-2:] == ["--normalizer", "basic"]


def test_it_trains_evaluates_and_leaves_a_result_once(tmp_path, calls):
    job = make(tmp_path, EvaluationConfig("asr", "sets/clean.jsonl", limit=7))
    job()
    assert calls[0] == ["train.sh", "--config", str(tmp_path / "config.yaml")]
    assert calls[1][:2] == ["python", "evaluate.py"]
    assert calls[1][-2:] == ["--limit", "7"] and str(tmp_path / "evaluation/asr_clean.json") in calls[1]
    result = json.loads((tmp_path / RESULT).read_text())
    assert result["identity"] == "abc" and result["attempts"] == 1
    job()
    assert len(calls) == 2


def test_a_failure_is_kept_with_its_last_error_and_the_next_attempt_counts(tmp_path, calls):
    calls.statuses = [1, 0]
    make(tmp_path)()
    failure = json.loads((tmp_path / FAILURE).read_text())
    assert failure["error"] == "training ended with status 1: error: model.hidden_size=3: must be even"
    assert failure["last_lines"][-1] == "Signal caught" and not (tmp_path / RESULT).exists()
    make(tmp_path)()
    assert json.loads((tmp_path / RESULT).read_text())["attempts"] == 2
    assert not (tmp_path / FAILURE).exists()


def test_a_failed_evaluation_is_a_failure(tmp_path, calls):
    calls.statuses = [0, 3]
    make(tmp_path, EvaluationConfig("asr", "clean.jsonl"))()
    assert "evaluation asr_clean ended with status 3" in json.loads((tmp_path / FAILURE).read_text())["error"]


def test_training_that_was_asked_to_stop_is_not_finished(tmp_path, calls):
    calls.statuses = [cli.STOPPED]
    make(tmp_path, EvaluationConfig("asr", "clean.jsonl"))()
    assert len(calls) == 1 and not (tmp_path / RESULT).exists() and not (tmp_path / FAILURE).exists()
    assert json.loads((tmp_path / STOPPED).read_text()) == {"identity": "abc"}
    make(tmp_path)()
    assert (tmp_path / RESULT).exists() and not (tmp_path / STOPPED).exists()
    assert json.loads((tmp_path / RESULT).read_text())["attempts"] == 1


def test_a_job_that_is_asked_to_stop_before_training_starts_does_not_train(tmp_path, monkeypatch):
    (tmp_path / CONFIG).write_text(dump_config(tiny_config(training__train_iters=6, run_dir=tmp_path)))
    monkeypatch.delenv("SLURM_NODEID", raising=False)
    job = Job(str(tmp_path), "abc", ResourcesConfig(), [], Programs(["sh", "-c", "sleep 60"], [], []))
    job._stop(signal.SIGTERM, None)
    began = time.monotonic()
    job()
    assert time.monotonic() - began < 30
    assert not any((tmp_path / name).exists() for name in (RESULT, FAILURE, STOPPED))


def test_training_that_ends_early_without_a_word_is_a_failure(tmp_path, calls):
    calls.reached = 4
    make(tmp_path)()
    error = json.loads((tmp_path / FAILURE).read_text())["error"]
    assert error == "training ended with status 0 after step 4 of 6"


def test_a_directory_that_another_process_holds_is_left_alone(tmp_path, calls):
    with lock(tmp_path) as held:
        assert held is not None
        make(tmp_path)()
    assert not calls and not (tmp_path / LOG).exists()


def test_only_the_first_node_keeps_the_books(tmp_path, calls, monkeypatch):
    monkeypatch.setenv("SLURM_NODEID", "1")
    make(tmp_path, EvaluationConfig("asr", "clean.jsonl"))()
    assert len(calls) == 1 and not (tmp_path / RESULT).exists()
