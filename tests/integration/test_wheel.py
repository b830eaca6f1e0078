"""An installed wheel without a checkout: every command does its work from an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from megatron_most.commands.__main__ import COMMANDS
from megatron_most.config import DatasetConfig, dump_config
from megatron_most.vocab import VocabLayout
from tests.distributed.tiny import tiny_config
from tests.integration.launching import ROOT
from tests.unit.data.tiny import write_wavs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SOURCES = ("megatron_most", "pyproject.toml", "setup.py", "README.md", "LICENSE")
VOCAB = VocabLayout(text_vocab_size=300, num_codebooks=4, codebook_size=1000)
SENTENCES = ("the red fox", "the black dog", "the little king")


class Installation:
    """A virtual environment that holds the wheel and sees the packages, but not the checkout, of this one."""

    def __init__(self, folder: Path) -> None:
        source, self.environment, self.work = folder / "source", folder / "venv", folder / "work"
        self.work.mkdir()
        source.mkdir()
        for name in SOURCES:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, source / name)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        offline = ["--no-deps", "--no-index"]
        build = [*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", folder, source]
        subprocess.run(build, check=True, env=self._bare(), cwd=folder)
        shutil.rmtree(source)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.environment], check=True)
        [wheel] = folder.glob("*.whl")
        self.python = self.environment / "bin" / "python"
        subprocess.run([*pip, "--python", self.python, "install", *offline, wheel], check=True, env=self._bare())
        packages = subprocess.run(
            [self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        (Path(packages) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")

    @staticmethod
    def _bare() -> dict[str, str]:
        hidden = ("PYTHONPATH", "VIRTUAL_ENV")
        return {name: value for name, value in os.environ.items() if name not in hidden}

    def run(self, *command: object, status: int = 0, **settings: str) -> str:
        """Standard output of a command in the folder of work."""
        known = {**self._bare(), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **settings}
        known["PATH"] = f"{self.environment / 'bin'}:{os.environ['PATH']}"
        words = [str(word) for word in command]
        done = subprocess.run(words, cwd=self.work, env=known, capture_output=True, text=True)
        assert done.returncode == status, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def most(self, *arguments: object, **options: object) -> str:
        return self.run("most", *arguments, **options)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installation:
    return Installation(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def trained(installed) -> Installation:
    """In the folder of work: ``m.jsonl`` and its recordings, a codec, datasets, ``run.yaml``, a run of three steps."""
    pytest.importorskip("nemo.collections.tts.models")
    work, most = installed.work, installed.most
    entries = write_wavs(work / "wav", len(SENTENCES), seconds=0.5)
    lines = [json.dumps({**entry, "text": text}) for entry, text in zip(entries, SENTENCES, strict=True)]
    (work / "found.jsonl").write_text("\n".join(lines))
    shutil.copy(ROOT / "examples" / "quickstart" / "codec" / "tiny_codec.nemo", work)
    most("prepare", "manifest", "--manifest", "found.jsonl", "--output", "m.jsonl")
    most("prepare", "tokenizer", "--manifest", "m.jsonl", "--vocab-size", 290, "--output", "t.model")
    codes = ("--codec", "tiny_codec.nemo", "--output", "codes", "--workers", 1)
    most("prepare", "tokenize", "--manifest", "m.jsonl", *codes)
    for task in ("asr", "tts"):
        build = ("--task", task, "--codes", "codes", "--tokenizer", "t.model", "--output", task)
        most("prepare", "build", *build, "--text-vocab-size", VOCAB.text_vocab_size)
    assert "3 documents" in most("prepare", "inspect", "--dataset", "asr", "--tokenizer", "t.model", "--document", 0)

    config = tiny_config(
        vocab__text_vocab_size=VOCAB.text_vocab_size,
        vocab__num_codebooks=VOCAB.num_codebooks,
        vocab__codebook_size=VOCAB.codebook_size,
        model__moe__moe_shared_expert_intermediate_size=48,  # two of the routed experts, as DeepSeek-V2 has them
        data__seq_length=64,
        training__train_iters=3,
        training__micro_batch_size=1,
        training__global_batch_size=2,
        logging__log_interval=1,
        tokenizer="t.model",
        codec="tiny_codec.nemo",
        run_dir="run",
    )
    config.data.train = [DatasetConfig(task) for task in ("asr", "tts")]
    (work / "run.yaml").write_text(dump_config(config))
    assert "ranks: 1" in most("train", "--config", "run.yaml", "--dry-run")
    launchers = most("launch").strip()
    single_node = f"{launchers}/single_node.sh"
    assert "finished 3 steps" in installed.run(single_node, "--config", "run.yaml", PET_NPROC_PER_NODE="1")
    return installed


def test_the_wheel_is_what_runs_and_knows_every_command(installed):
    where = installed.run("python", "-c", "import megatron_most; print(megatron_most.__file__)")
    assert Path(where.strip()).is_relative_to(installed.environment)
    listed = installed.most("--help")
    assert all(f"  {name}" in listed for name in COMMANDS)
    assert "can train on this machine" in installed.most("doctor")


def test_the_scripts_of_a_cluster_come_along(installed):
    launchers = Path(installed.most("launch").strip())
    assert launchers.is_relative_to(installed.environment)
    assert os.access(launchers / "multi_node.sh", os.X_OK) and (launchers / "pytorchjob.yaml").is_file()
    line = installed.run(launchers / "check_node.sh", SLURMD_NODENAME="node7", MOST_GPUS_PER_NODE="0")
    assert line == "node7: fit, 0 GPUs\n"


def test_a_plan_is_made(trained):
    assert "layouts of 2 x h100 fit" in trained.most("plan", "--config", "run.yaml", "--gpus", 2)


def test_a_recording_becomes_text_and_text_becomes_a_recording(trained):
    model = ("--checkpoint", "run")
    write = ("--task", "asr", "--input", "wav/0.wav", "--max-new-tokens", 4, "--output", "0.txt")
    trained.most("generate", *model, *write)
    assert (trained.work / "0.txt").is_file()
    speak = ("--task", "tts", "--input", SENTENCES[0], "--max-seconds", 0.4, "--output", "said.wav")
    trained.most("generate", *model, *speak)
    assert (trained.work / "said.wav").stat().st_size > 44
    speechify = ("--chat", "chat.jsonl", "--synthesizer", "cp said.wav {output}", "--output", "spoken", "--workers", 1)
    chat = {"id": "1", "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"}]}
    (trained.work / "chat.jsonl").write_text(json.dumps(chat))
    trained.most("prepare", "speechify", *speechify)
    assert (trained.work / "spoken" / "chats.jsonl").is_file()


def test_an_evaluation_is_reported(trained):
    pytest.importorskip("pocketsphinx")
    data = ("--checkpoint", "run", "--data", "m.jsonl", "--limit", 1)
    trained.most("evaluate", *data, "--suite", "asr", "--output", "run/evaluation/asr_m.json")
    trained.most("evaluate", *data, "--suite", "tts", "--max-seconds", 0.4, "--output", "run/evaluation/tts_m.json")
    assert trained.most("report", "run") == "run/report.html\n"
    page = (trained.work / "run" / "report.html").read_text()
    assert "whisper-english" in page and len(page) > 10_000


def test_a_checkpoint_leaves_comes_back_and_both_agree(trained):
    trained.most("convert", "export", "--checkpoint", "run", "--format", "deepseek-v2", "--out", "hf")
    assert "Hugging Face model" in trained.most("convert", "inspect", "hf")
    assert "logits of" in trained.most("convert", "verify", "--hf", "hf", "--checkpoint", "run")
    wanted = ("--experts", "expand", "--audio-vocab", "frame:4x1000")
    trained.most("convert", "import", "--hf", "hf", "--out", "back", *wanted)
    assert "native checkpoint" in trained.most("convert", "inspect", "back")


def test_a_sweep_starts_trains_and_evaluates(trained):
    (trained.work / "sweep.yaml").write_text(
        "{name: tiny, base: run.yaml, output: out, seeds: [1], axes: {optimizer.lr: [1.0e-3, 2.0e-3]},"
        " evaluation: [{suite: asr, data: m.jsonl, limit: 1}]}"
    )
    assert "2 runs" in trained.most("sweep", "--spec", "sweep.yaml", "--dry-run")
    out = trained.most("sweep", "--spec", "sweep.yaml")
    assert out.count("finished in") == 2, out
    assert (trained.work / "out" / "sweep.html").is_file()
    assert (trained.work / "out" / "results.csv").read_text().count("finished") == 2
