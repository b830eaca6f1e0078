"""The command contract: every command answers --help, exits 0 only on success, and says what is wrong in one line."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.harness import run_ranks
from tests.unit.report.fake_run import make_run

ROOT = Path(__file__).parents[2]
DOORS = [*(ROOT / "tools").glob("*.py"), ROOT / "examples" / "pretrain_most.py"]
COMMANDS = sorted(path for path in DOORS if path.name != "install_missing.py")  # that one is no command of most

TTS = ["--checkpoint", "c", "--task", "tts", "--input", "hello"]
EVALUATE = ["--checkpoint", "c", "--suite", "asr", "--data", "{manifest}"]

WRONG = {
    "doctor.py": [
        (["--run-dir"], "expected one argument", 2),
        (["--json", "--check"], "not allowed with argument", 2),
    ],
    "report.py": [
        (["{tmp}/absent"], "error: {tmp}/absent: no such run directory", 1),
        (["{tmp}"], "error: {tmp}: holds no run", 1),
        ([], "the following arguments are required: run_dir", 2),
    ],
    "prepare_data.py": [
        (
            ["tokenize", "--manifest", "{tmp}/absent.jsonl", "--codec", "{tmp}/absent.nemo", "--output", "{tmp}/codes"],
            "absent.",
            1,
        ),
        (["inspect", "--dataset", "{tmp}/absent"], "{tmp}/absent", 1),
        (["build", "--task", "asr", "--tokenizer", "{tmp}/absent.model", "--output", "{tmp}/data"], "error: ", 1),
        (
            ["tokenize", "--manifest", "m", "--codec", "c", "--output", "{tmp}/codes", "--workers", "-1"],
            "error: --workers=-1: must be greater than 0",
            1,
        ),
        (
            ["tokenize", "--manifest", "m", "--codec", "c", "--output", "{config}/codes"],
            "error: {config}/codes.json: cannot be written: ",
            1,
        ),
        (
            ["build", "--task", "asr", "--tokenizer", "t", "--codes", "c", "--output", "{config}/asr"],
            "error: {config}/asr.json: cannot be written: ",
            1,
        ),
        (
            ["tokenizer", "--manifest", "m", "--vocab-size", "300", "--output", "{config}/t.model"],
            "error: {config}/t.model: cannot be written: ",
            1,
        ),
        (["melt"], "invalid choice: 'melt'", 2),
    ],
    "convert_checkpoint.py": [
        (["import", "--hf", "{tmp}/absent", "--out", "{tmp}/o"], "error: {tmp}/absent: no such directory", 1),
        (["import", "--hf", "h", "--out", "{tmp}"], "error: {tmp}: exists already", 1),
        (["import", "--hf", "h", "--out", "o", "--experts", "melt"], "invalid choice: 'melt'", 2),
        (["export", "--checkpoint", "c", "--format", "llama", "--out", "{tmp}"], "error: {tmp}: exists already", 1),
        (["export", "--checkpoint", "{tmp}/absent", "--format", "most", "--out", "{tmp}/o"], "no such checkpoint", 1),
        (
            ["export", "--checkpoint", "c", "--format", "most", "--out", "{tmp}/o", "--max-shard-size", "5"],
            "error: --max-shard-size=5: must be a whole number and one of KB, MB, GB, TB",
            1,
        ),
        (["verify", "--hf", "{tmp}/absent", "--checkpoint", "c"], "error: {tmp}/absent: no such directory", 1),
        (["verify", "--hf", "h", "--checkpoint", "c", "--tolerance", "0"], "error: --tolerance=0.0: must be", 1),
        (["inspect", "{tmp}"], "error: {tmp}: holds no complete checkpoint", 1),
    ],
    "generate.py": [
        (["--checkpoint", "{tmp}/absent", "--task", "asr", "--input", "a.wav"], "{tmp}/absent", 1),
        (["--checkpoint", "{tmp}/absent", "--task", "tts", "--input", "hello"], "error: --output: ", 1),
        ([*TTS, "--output", "{config}/a.wav"], "error: {config}/a.wav: cannot be written: ", 1),
        ([*TTS, "--output", "{tmp}"], "error: {tmp}: is a folder", 1),
        ([*TTS, "--output", "{tmp}/a.wav", "--max-seconds", "-1"], "error: --max-seconds=-1.0: must be greater", 1),
        (
            ["--checkpoint", "c", "--task", "asr", "--input", "a.wav", "--max-new-tokens", "0"],
            "error: --max-new-tokens=0: must be greater than 0",
            1,
        ),
        (
            ["--checkpoint", "c", "--task", "tts", "--input", "{latin}", "--output", "{tmp}/a.wav"],
            "error: {latin}: must be UTF-8 text",
            1,
        ),
    ],
    "evaluate.py": [
        (
            ["--checkpoint", "{tmp}/a", "--suite", "asr", "--data", "{tmp}/absent.jsonl", "--output", "{tmp}/o.json"],
            "{tmp}/absent.jsonl",
            1,
        ),
        ([*EVALUATE, "--output", "{tmp}/o.json", "--limit", "0"], "error: --limit=0: must be greater than 0", 1),
        ([*EVALUATE, "--output", "{config}/o.json"], "error: {config}/o.results.jsonl: cannot be written: ", 1),
    ],
    "plan.py": [
        (["--config", "{tmp}/absent.yaml", "--gpus", "8"], "error: {tmp}/absent.yaml: no such file", 1),
        (["--config", "{config}", "--gpus", "0"], "error: --gpus=0: must be greater than 0", 1),
        (["--config", "{config}", "--gpus", "8", "--gpu", "abacus"], "invalid choice: 'abacus'", 2),
    ],
    "sweep.py": [
        (["--spec", "{tmp}/absent.yaml"], "error: {tmp}/absent.yaml: no such file", 1),
        (["--spec", "{config}"], "error: {config}: ", 1),
        (["--spec", "s", "--executor", "abacus"], "invalid choice: 'abacus'", 2),
        (["--spec", "s", "--collect", "--dry-run"], "not allowed with argument", 2),
    ],
    "pretrain_most.py": [
        (["--config", "{tmp}/absent.yaml"], "error: {tmp}/absent.yaml: no such file", 1),
        (["--config", "{config}", "model.num_layer=4"], "unknown key; did you mean 'num_layers'?", 1),
        (["--config", "{config}", "training.train_iters=many"], "training.train_iters='many': must be an integer", 1),
        (["--config", "{config}", "parallel.expert_model_parallel_size=3"], "must divide the 8 experts", 1),
        (
            ["--config", "{config}", "model.moe.groups.0.moe_router_topk=5"],
            "must not exceed the 4 experts its tokens may choose",
            1,
        ),
        (["--config", "{config}", "parallel.pipeline_model_parallel_size=2"], "but only 1 were started", 1),
        (["--config", "{config}"], "error: ", 1),
        (["--replay", "{tmp}/absent.json"], "error: {tmp}/absent.json: no such file", 1),
        (["--replay", "{config}"], "error: {config}: not readable as JSON: ", 1),
        (["--replay", "f", "--dry-run"], "error: --replay=f: cannot be combined with --dry-run", 1),
        (["--replay", "f", "--config", "{config}"], "not allowed with argument", 2),
        ([], "one of the arguments --config --replay is required", 2),
    ],
}
"""For each command: arguments, what the last line of standard error must hold, and the exit status."""

CONFIG = """
vocab: {text_vocab_size: 100, num_codebooks: 4, codebook_size: 1000}
model:
  num_layers: 2
  hidden_size: 64
  ffn_hidden_size: 128
  moe: {groups: [{modality: text, size: 4, moe_router_topk: 2}, {modality: audio, size: 4, moe_router_topk: 2}]}
precision: {dtype: fp32}
"""


def run(script: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command, run in a fork of this warm process."""
    [result] = run_ranks(1, _run_here, script, arguments)
    return result


def _run_here(script: Path, arguments: tuple[str, ...]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    sys.argv = [str(script), *arguments]
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as leaving:
            status = leaving.code or 0
    return status, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.name)
def test_every_command_answers_help(script):
    status, out, _ = run(script, "--help")
    assert status == 0
    assert out.startswith("usage: ")
    assert "--debug" in out


def test_every_command_has_wrong_input_to_answer():
    assert set(WRONG) == {script.name for script in COMMANDS}


@pytest.mark.parametrize(
    ("script", "case"),
    [(script, index) for script in COMMANDS for index in range(len(WRONG.get(script.name, [])))],
    ids=lambda value: value.name if isinstance(value, Path) else str(value),
)
def test_wrong_input_is_one_line_and_leaves_nothing(script, case, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG + f"run_dir: {tmp_path / 'run'}\n")
    arguments, message, status = WRONG[script.name][case]
    (tmp_path / "latin.txt").write_bytes("Käse".encode("latin-1"))
    (tmp_path / "m.jsonl").write_text('{"audio_filepath": "a.wav", "text": "a"}')
    given = {"tmp": tmp_path, "config": config, "latin": tmp_path / "latin.txt", "manifest": tmp_path / "m.jsonl"}
    places = {name: str(path) for name, path in given.items()}
    got, out, err = run(script, *(argument.format(**places) for argument in arguments))
    assert got == status, err
    assert out in ("", "loading torch and Megatron-Core\nreading the datasets\n")  # what it does before it knows
    assert message.format(**places) in err.splitlines()[-1]
    assert "Traceback" not in err
    if status == 1:
        assert [line for line in err.splitlines() if line.startswith("error: ")] == [err.splitlines()[-1]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latin.txt", "m.jsonl", "run.yaml"]


def test_the_doctor_starts_by_itself_and_speaks_json():
    done = subprocess.run(
        [sys.executable, "tools/doctor.py", "--json"], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["can_train"] is True


def test_the_report_prints_where_it_is(tmp_path):
    run_dir = make_run(tmp_path / "run", steps=40)
    status, out, err = run(ROOT / "tools" / "report.py", str(run_dir))
    assert (status, err) == (0, "")
    assert Path(out.strip()) == run_dir / "report.html"
    assert (run_dir / "report.html").stat().st_size > 10_000
