"""All of megatron_most on one small machine: synthesize a corpus, tokenize it, train, evaluate, speak, report.

    make quickstart                # or: python examples/quickstart/run.py [--run-dir DIR] [key=value ...]

Each step is a command that a user could type, printed before it runs. Complete steps are skipped, so an interrupted
quickstart resumes when it is run again. A step is repeated if its command or one of its input files has changed.
Checkpoints of another configuration or other data are an error.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from megatron_most import cli
from megatron_most.audio import file_fingerprint
from megatron_most.checkpointing import read_metadata
from megatron_most.checkpointing.directory import checkpoints_directory
from megatron_most.config import load_config
from megatron_most.errors import MostError
from megatron_most.files import write_text

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = Path("examples/quickstart")
CONFIG = Path("examples/configs/quickstart.yaml")
CODEC = QUICKSTART / "codec" / "tiny_codec.nemo"
SPLITS = ("train", "heldout_s", "heldout_p")
SPEECH_DATASETS = (("train", "asr"), ("train", "tts"), ("heldout_s", "asr"), ("heldout_s", "tts"))


@dataclass
class Step:
    """One command and the files it depends on in addition to earlier steps.

    Args:
        continues: folder of unfinished work that the command resumes; None if it starts from the beginning.
        training_steps: the step that training has to reach; ranks that are asked to stop exit earlier with status 0.
    """

    name: str
    what: str
    command: list[str]
    inputs: list[Path] = field(default_factory=list)
    continues: Path | None = None
    training_steps: int | None = None


def make_steps(run_dir: Path, overrides: list[str]) -> list[Step]:
    """The commands in order. Each depends on those before it."""
    config = load_config(ROOT / CONFIG, [f"run_dir={run_dir}", *overrides])
    vocab = config.vocab
    python, prepare = sys.executable, "tools/prepare_data.py"
    corpus, data = run_dir / "corpus", run_dir / "data"
    build = [python, prepare, "build", "--tokenizer", f"{data}/tokenizer.model"]
    build += ["--text-vocab-size", str(vocab.text_vocab_size), "--overwrite"]
    transcripts = [QUICKSTART / "corpus" / f"{split}.jsonl" for split in SPLITS]

    speak = [python, f"{QUICKSTART}/make_corpus.py", "--output", str(corpus)]
    steps = [Step("corpus", "synthesize 4,400 sentences with espeak-ng", speak, transcripts)]
    learn = [python, prepare, "tokenizer", "--manifest", f"{corpus}/train.jsonl"]
    learn += ["--vocab-size", str(vocab.text_vocab_size), "--output", f"{data}/tokenizer.model"]
    steps.append(Step("tokenizer", "learn a text tokenizer from the transcripts", learn))
    for split in ("train", "heldout_s"):
        encode = [python, prepare, "tokenize", "--manifest", f"{corpus}/{split}.jsonl", "--codec", str(CODEC)]
        encode += ["--output", f"{data}/codes/{split}"]
        steps.append(Step(f"codes_{split}", f"turn the audio of {split} into codec codes", encode, [CODEC]))
    for split, task in SPEECH_DATASETS:
        name = f"{split}_{task}"
        command = [*build, "--task", task, "--codes", f"{data}/codes/{split}", "--output", f"{data}/{name}"]
        steps.append(Step(name, f"build the dataset {name}", command))
    text = [*build, "--task", "text_lm", "--text", f"{corpus}/train.jsonl", "--output", f"{data}/train_text"]
    text += ["--num-codebooks", str(vocab.num_codebooks), "--codebook-size", str(vocab.codebook_size)]
    steps.append(Step("train_text", "build the dataset train_text", text))

    train = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    train += ["examples/pretrain_most.py", "--config", str(CONFIG), f"run_dir={run_dir}", *overrides]
    what = "train on 2 ranks with expert parallelism"
    steps.append(Step("train", what, train, [CONFIG], checkpoints_directory(run_dir), config.training.train_iters))
    evaluate = [python, f"{QUICKSTART}/evaluate.py", "--run-dir", str(run_dir), "--corpus", str(corpus)]
    steps.append(Step("evaluate", "transcribe and speak held-out sentences", evaluate))
    steps.append(Step("report", "draw the report", [python, "tools/report.py", str(run_dir)]))
    return steps


def run_steps(steps: list[Step], run_dir: Path) -> None:
    """Run the steps that are not complete.

    Raises:
        MostError: a step failed, or would resume the work of another configuration.
    """
    stamps = run_dir / "steps"
    stamps.mkdir(parents=True, exist_ok=True)
    identity = ""
    for number, step in enumerate(steps, start=1):
        label = f"[{number}/{len(steps)}] {step.what}"
        identity = _identity(identity, step)
        stamp = stamps / f"{step.name}.done"
        if stamp.is_file() and stamp.read_text() == identity:
            print(f"{label}: done already", flush=True)
            continue
        if step.continues is not None:
            _claim(step.continues, stamps / f"{step.name}.started", identity)
        print(f"{label}\n    {' '.join(_shown(part) for part in step.command)}", flush=True)
        start = time.monotonic()
        status = subprocess.run(step.command, cwd=ROOT, env=_environment(), check=False).returncode
        if status:
            raise MostError(f"step {step.name} failed with status {status}; fix the error above and run again")
        if step.training_steps is not None and step.continues is not None:
            _require_trained(step.name, ROOT / step.continues.parent, step.training_steps)
        write_text(stamp, identity)
        print(f"{label}: {time.monotonic() - start:.0f} s", flush=True)


def _claim(folder: Path, started: Path, identity: str) -> None:
    """Record whose work ``folder`` holds; raise MostError if it is that of a step with another identity."""
    folder = ROOT / folder
    if started.is_file() and started.read_text() != identity and folder.is_dir() and any(folder.iterdir()):
        raise MostError(
            f"{folder.parent} was trained with another configuration or other data: remove it or use --run-dir"
        )
    write_text(started, identity)


def _require_trained(name: str, run_dir: Path, steps: int) -> None:
    reached = read_metadata(run_dir).step
    if reached < steps:
        raise MostError(f"{name} was stopped after step {reached} of {steps}; run again to continue")


def _identity(previous: str, step: Step) -> str:
    """A hash of the commands and files of this step and of all steps before it."""
    parts = [previous, *step.command, *(file_fingerprint(ROOT / path) for path in step.inputs)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _shown(part: str) -> str:
    return "python" if part == sys.executable else part


def _environment() -> dict[str, str]:
    """Makes the package importable, and limits threads: ranks and workers set their own."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def quickstart(arguments: argparse.Namespace) -> None:
    start = time.monotonic()
    run_dir = arguments.run_dir
    run_steps(make_steps(run_dir, arguments.overrides), run_dir if run_dir.is_absolute() else ROOT / run_dir)
    print(f"finished in {time.monotonic() - start:.0f} s; open {run_dir}/report.html, hear {run_dir}/samples/")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="train, evaluate and hear a tiny MoST on this machine")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("overrides", nargs="*", help="training configuration, as key=value")
    cli.run(parser, quickstart)
