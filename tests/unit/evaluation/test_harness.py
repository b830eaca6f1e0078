"""lm-evaluation-harness on a Llama and on what it was converted to: the same numbers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import yaml

pytest.importorskip("lm_eval", reason="the extra 'harness' is not installed")

from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing

from megatron_most import parallel
from megatron_most.commands import harness as command
from megatron_most.conversion import ImportOptions, import_model
from megatron_most.evaluation.harness import MostLM, _until
from tests.unit.conversion.models import fresh_copy, llama
from tests.unit.evaluation.stubs import WORDS, write_tokenizer

TEXTS = ["the fox sees a dog", "a dog sleeps", "foxes and dogs, dogs and foxes " * 8, "x"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    llama(folder / "hf", vocab_size=len(WORDS), bos_token_id=0, eos_token_id=1)
    tokenizer = write_tokenizer(folder / "hf")
    begins = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])  # as Llama's tokenizers do
    tokenizer.backend_tokenizer.post_processor = begins
    chosen = ImportOptions(
        "upcycle", "frame:2x16", overrides=["model.moe.expert_backend=sequential", "data.seq_length=64"]
    )
    checkpoint = import_model(folder / "hf", folder / "native", chosen)
    theirs = HFLM(
        pretrained=fresh_copy(folder / "hf"), tokenizer=tokenizer, add_bos_token=True, batch_size=2, device="cpu"
    )
    yield theirs, MostLM(str(checkpoint), str(folder / "hf"), batch_size=3), checkpoint
    parallel.destroy()


def requests(*arguments: tuple) -> list:
    return [SimpleNamespace(args=one) for one in arguments]


def test_likelihoods_are_those_of_the_original(models):
    theirs, mine, _ = models
    asked = requests(*[(text, f" {text[:20]}") for text in TEXTS], ("", "the dog"), ("and ", "fox"), ("a " * 80, "dog"))
    expected, found = theirs.loglikelihood(asked, disable_tqdm=True), mine.loglikelihood(asked, disable_tqdm=True)
    for (value, is_greedy), (my_value, mine_is_greedy) in zip(expected, found, strict=True):
        assert my_value == pytest.approx(value, abs=1e-4, rel=1e-4)
        assert mine_is_greedy == is_greedy
    rolling = requests(*[(text,) for text in TEXTS])
    theirs.add_bos_token = False  # a rolling window begins with it anyway
    assert mine.loglikelihood_rolling(rolling) == pytest.approx(
        theirs.loglikelihood_rolling(rolling, disable_tqdm=True), rel=1e-4
    )
    theirs.add_bos_token = True


def test_answers_are_those_of_the_original(models):
    theirs, mine, _ = models
    until = {"until": ["q", "."], "max_gen_toks": 12, "do_sample": False}
    # Answers in which the original has no beginning of sequence; here it cannot be generated.
    asked = requests(*[(text, until) for text in ("a dog sleeps", "x")], ("the", {"until": [], "max_gen_toks": 3}))
    expected = theirs.generate_until(asked[:-1], disable_tqdm=True)
    assert [text.replace(" ", "") for text in mine.generate_until(asked)[:-1]] == [
        text.replace(" ", "") for text in expected
    ]
    assert _until("one. two", [".", "w"]) == "one" and _until("one", None) == "one" and _until("one", "n") == "o"


def test_the_command_runs_a_task_and_writes_its_results(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    rows = [
        {"question": f"{animal} and", "choices": ["dog", "fox"], "answer": place}
        for place, animal in ((0, "a"), (1, "x"))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "animals",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "animals.yaml").write_text(yaml.safe_dump(task))
    checkpoint = models[2]
    common = ["--checkpoint", str(checkpoint), "--tokenizer", str(checkpoint.parent / "hf")]
    common += ["--include-path", str(tmp_path / "tasks"), "--output", str(tmp_path / "out.json")]
    command.main([*common, "--tasks", "animals"])
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["results"]["animals"]["acc,none"] in (0.0, 0.5, 1.0) and found["model"]["kind"] == "native"
    assert "|animals|" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main([*common, "--tasks", "no_such_task"])
    assert "--tasks: the harness has no task 'no_such_task'" in capsys.readouterr().err
