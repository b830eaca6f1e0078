"""sWUGGY and sBLIMP against the challenge's own scorer, run as a program in a Python of its own.

It needs old versions of pandas and pydantic:

    python -m venv zerospeech
    zerospeech/bin/pip install zerospeech-benchmarks==0.9.4 "pandas<3" "pydantic[email]<2" setuptools
    export MOST_ZEROSPEECH_PYTHON=$PWD/zerospeech/bin/python
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_most.evaluation.running import run_suite
from megatron_most.evaluation.suites.zerospeech import Sblimp, Swuggy
from tests.unit.evaluation import published
from tests.unit.evaluation.stubs import StubModel, guess

PYTHON = os.environ.get("MOST_ZEROSPEECH_PYTHON")
pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="needs a Python with zerospeech-benchmarks, named in MOST_ZEROSPEECH_PYTHON"
)

PROGRAM = """
import json, sys
from pathlib import Path
from zerospeech.tasks.lm.lexical import LexicalTask
from zerospeech.tasks.lm.syntactic import SyntacticTask

task, gold, submission = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
if task == "lexical":
    pairs = LexicalTask.eval_by_pair(LexicalTask.load_and_format(submission, gold))
    bands = LexicalTask.eval_by_frequency(pairs)
    groups = {"frequency": bands, "length": LexicalTask.eval_by_length(pairs)}
else:
    pairs, types = SyntacticTask.run_syntactic_comparison(SyntacticTask, gold, submission)
    groups = {"type": types}
rows = {
    name: {str(key): [float(score), int(n)] for key, score, n in zip(table[name], table.score, table.n) if n}
    for name, table in groups.items()
}
print("SCORES " + json.dumps({"score": float(pairs["score"].mean()), "pairs": len(pairs), **rows}))
"""


def official(task: str, gold: Path, submission: Path, home: Path) -> dict[str, Any]:
    # Without an index, or with a new one, the package asks its server for one when it is imported.
    index = home / "zr-data" / "repo.json"
    index.parent.mkdir(exist_ok=True)
    index.write_text("{}")
    os.utime(index, (0, 0))
    done = subprocess.run(
        [str(PYTHON), "-W", "ignore", "-c", PROGRAM, task, str(gold), str(submission)],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "HOME": str(home)},
    )
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("SCORES ")]
    return json.loads(line.removeprefix("SCORES "))


@pytest.mark.parametrize("split", ["dev", "test"])
@pytest.mark.parametrize("suite", [Swuggy, Sblimp])
def test_scores_and_their_breakdown_are_those_of_the_challenge(suite: Any, split: str, tmp_path: Path) -> None:
    root = published.zerospeech(tmp_path / "data", 30, split)
    result = run_suite(suite(root, split), StubModel(guess), tmp_path / "result.json")
    submission = tmp_path / "result.submission" / suite.folder / f"{split}.txt"
    theirs = official(suite.folder, root / suite.folder / split / "gold.csv", submission, tmp_path)
    assert theirs.pop("pairs") == result["num_units"]
    assert theirs.pop("score") == pytest.approx(result["score"], abs=1e-12)
    for name, groups in theirs.items():
        mine = {key: [one["score"], one["num_units"]] for key, one in result["breakdown"][name].items()}
        assert set(mine) == set(groups), name
        for key, expected in groups.items():
            assert mine[key] == pytest.approx(expected), (name, key)
