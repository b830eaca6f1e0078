"""Judge a model on all suites: ``most evaluate`` for each of them, in one process.

    python examples/two_stages/evaluate.py --run-dir runs/two_stages --checkpoint runs/two_stages/stage1 \\
        --output runs/two_stages/stage1/evaluation

An interrupted evaluation goes on where it ended.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.quickstart.sentences import balanced_sentences  # noqa: E402
from megatron_most import cli  # noqa: E402
from megatron_most.commands.evaluate import summary_of  # noqa: E402
from megatron_most.data.preparation.manifest import read_manifest  # noqa: E402
from megatron_most.errors import MostError  # noqa: E402
from megatron_most.evaluation.interface import EvaluatedModel, load_model  # noqa: E402
from megatron_most.evaluation.recognizers.closed_vocabulary import PocketsphinxRecognizer  # noqa: E402
from megatron_most.evaluation.running import read_outcomes, run_suite  # noqa: E402
from megatron_most.evaluation.suites.base import Outcome, Suite  # noqa: E402
from megatron_most.evaluation.suites.questions import QuestionSuite  # noqa: E402
from megatron_most.evaluation.suites.speech import AsrSuite, EvaluationSet, TtsSuite  # noqa: E402
from megatron_most.evaluation.suites.stories import Salmon, StoryCloze  # noqa: E402
from megatron_most.evaluation.suites.text import TextSuite  # noqa: E402
from megatron_most.evaluation.suites.zerospeech import Sblimp, Swuggy  # noqa: E402
from megatron_most.inference import Decoding, load_for_generation  # noqa: E402

NORMALIZER = "basic"  # Whisper's turns "two nine", two words of the corpus, into one number
SPEECH = 40
"""Sentences to transcribe and to speak."""
WRITTEN = Decoding(max_new=16)  # twice a sentence's ids: an untrained model never ends one
SENTENCE, ANSWER = Decoding(max_seconds=4.0), Decoding(max_seconds=3.0)
CLOSE = 1e-3
"""Largest difference between the likelihoods, in nats, of what is the same model."""


def suites(run_dir: Path, limit: int | None) -> Iterator[tuple[str, Suite[Any]]]:
    """Name of the result's file, and the suite."""
    sets, manifest = run_dir / "sets", run_dir / "corpus" / "heldout_s.jsonl"
    zerospeech = sets / "sLM21-dataset"
    sentences = EvaluationSet("heldout_s", read_manifest(manifest)[: limit or SPEECH], NORMALIZER)
    answers = [record.text for record in read_manifest(sets / "answers.jsonl", needs_audio=False)]
    questions = sets / "eval_datas" / "web_questions"
    yield "asr", AsrSuite(sentences, WRITTEN)
    yield "tts", TtsSuite(sentences, PocketsphinxRecognizer(balanced_sentences()), SENTENCE)
    yield "swuggy", Swuggy(zerospeech, limit=limit)
    yield "sblimp", Sblimp(zerospeech, limit=limit)
    yield "storycloze_sSC", StoryCloze(sets / "sSC", limit=limit)
    yield "storycloze_tSC", StoryCloze(sets / "tSC", limit=limit)
    yield "salmon", Salmon(sets / "salmon_benchmark", limit)
    yield "sqa_written", QuestionSuite(questions, WRITTEN, limit=limit)
    yield "sqa_spoken", QuestionSuite(questions, ANSWER, PocketsphinxRecognizer(answers), limit)
    yield "text", TextSuite(manifest, limit)


def judge(model: EvaluatedModel, run_dir: Path, output: Path, limit: int | None) -> None:
    """Write the results of all suites to ``output``."""
    for name, suite in suites(run_dir, limit):
        start = time.monotonic()
        result = run_suite(suite, model, output / f"{name}.json")
        print(f"  {summary_of(result)} ({time.monotonic() - start:.0f} s)", flush=True)


def require_same(output: Path, reference: Path) -> int:
    """The number of samples in ``output``, each of which is answered as in ``reference``.

    Raises:
        MostError: the first that is not.
    """
    count = 0
    for path in sorted(output.glob("*.json")):
        known = {outcome["id"]: outcome for outcome in read_outcomes(reference / path.name)}
        for outcome in read_outcomes(path):
            if not _is_same(outcome, known[outcome["id"]]):
                raise MostError(f"{path}: {outcome['id']}: is not answered as in {reference / path.name}")
            count += 1
    return count


def _is_same(one: Outcome, other: Outcome) -> bool:
    """Whether texts are equal, and likelihoods close."""
    texts = [key for key in ("hypothesis", "answer", "failed") if one.get(key) != other.get(key)]
    numbers = [("nats", one, other)] if "nats" in one else []
    for side in ("positive", "negative"):
        if side in one:
            numbers += [(reading, one[side], other[side]) for reading in one[side]]
    return not texts and all(math.isclose(a[key], b[key], rel_tol=1e-5, abs_tol=CLOSE) for key, a, b in numbers)


def evaluate(arguments: argparse.Namespace) -> None:
    cli.require_positive(arguments, "limit")
    run_dir, checkpoint = arguments.run_dir, str(arguments.checkpoint)
    if arguments.untrained is not None:
        print("the untrained model", flush=True)
        loaded = load_for_generation(checkpoint, random_weights=True)
        judge(EvaluatedModel(loaded, {"name": "untrained"}), run_dir, arguments.untrained, arguments.limit)
    print(checkpoint, flush=True)
    judge(load_model(checkpoint), run_dir, arguments.output, arguments.limit)
    if arguments.same_as is not None:
        count = require_same(arguments.output, arguments.same_as)
        print(f"{checkpoint}: {count} of {count} answers and likelihoods are those in {arguments.same_as}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="judge a model on all suites")
    parser.add_argument("--run-dir", type=Path, required=True, help="holds corpus and sets")
    parser.add_argument("--checkpoint", type=Path, required=True, help="run, checkpoint or export")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--untrained", type=Path, help="folder for the results of the model before its training")
    parser.add_argument("--same-as", type=Path, help="results that must be the same, sample for sample")
    parser.add_argument("--limit", type=int, help="only the first LIMIT samples of each set")
    cli.run(parser, evaluate)
