"""All of megatron_most on one small machine: synthesize a corpus, tokenize it, train, evaluate, speak, report.

    make quickstart                # or: python examples/quickstart/run.py [--run-dir DIR] [key=value ...]

Each step is a command that a user could type, printed before it runs. Complete steps are skipped, so an interrupted
quickstart resumes when it is run again. A step is repeated if its command or one of its input files has changed.
Checkpoints of another configuration or other data are an error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
# Not torch, which takes seconds to import: the first step is to begin at once.
from examples.quickstart.outlook import Outlook, Ticker, about  # noqa: E402
from megatron_most import cli  # noqa: E402
from megatron_most.audio import file_fingerprint  # noqa: E402
from megatron_most.config import load_config  # noqa: E402
from megatron_most.errors import MostError  # noqa: E402
from megatron_most.files import write_text  # noqa: E402
from megatron_most.processes import call  # noqa: E402

QUICKSTART = Path("examples/quickstart")
CONFIG = Path("examples/configs/quickstart.yaml")
CODEC = QUICKSTART / "codec" / "tiny_codec.nemo"
SPLITS = ("train", "heldout_s", "heldout_p")
SPEECH_DATASETS = (("train", "asr"), ("train", "tts"), ("heldout_s", "asr"), ("heldout_s", "tts"))

SECONDS = {"corpus": 45, "codes_train": 75, "codes_heldout_s": 25, "train": 390, "evaluate": 320}
"""What the long steps take on two cores. README tells their sum with that of the others, :data:`MINUTES`."""
SHORT = 6
"""What each other step takes."""
MINUTES = 15


@dataclass
class Step:
    """One command and the files it depends on in addition to earlier steps.

    Args:
        trains: run directory of the training that the command begins or continues; None if it does something else.
        training_steps: the step that training has to reach; it may be asked to stop earlier.
    """

    name: str
    what: str
    command: list[str]
    inputs: list[Path] = field(default_factory=list)
    trains: Path | None = None
    training_steps: int | None = None

    @property
    def seconds(self) -> float:
        """What it is expected to take from where it is."""
        return SECONDS.get(self.name, SHORT) * (1 - self.reached())

    def reached(self) -> float:
        """Which fraction of it is done; only training can tell, and begins where it ended."""
        if self.trains is None or self.training_steps is None:
            return 0.0
        try:
            *_, last, _ = (ROOT / self.trains / "metrics.jsonl").read_bytes().split(b"\n")
            return min(json.loads(last)["step"] / self.training_steps, 0.99)
        except (OSError, ValueError, KeyError):
            return 0.0


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

    train = [python, "-m", "megatron_most.commands.torchrun", "--standalone", "--nproc-per-node", "2"]
    train += ["examples/pretrain_most.py", "--config", str(CONFIG), f"run_dir={run_dir}", *overrides]
    what = "train on 2 ranks with expert parallelism"
    steps.append(Step("train", what, train, [CONFIG], run_dir, config.training.train_iters))
    evaluate = [python, f"{QUICKSTART}/evaluate.py", "--run-dir", str(run_dir), "--corpus", str(corpus)]
    steps.append(Step("evaluate", "transcribe and speak held-out sentences", evaluate))
    steps.append(Step("report", "draw the report", [python, "tools/report.py", str(run_dir)]))
    return steps


def run_steps(steps: list[Step], run_dir: Path) -> None:
    """Run the steps that are not complete.

    Raises:
        MostError: a step failed, or would resume the work of another configuration.
        SystemExit: after Ctrl-C, with status 130, when the step has saved what it had.
    """
    stamps = run_dir / "steps"
    stamps.mkdir(parents=True, exist_ok=True)
    identity, identities = "", []
    for step in steps:
        identity = _identity(identity, step)
        identities.append(identity)
    is_done = [_read(stamps / f"{step.name}.done") == one for step, one in zip(steps, identities, strict=True)]
    expected = [0.0 if done else step.seconds for step, done in zip(steps, is_done, strict=True)]
    outlook, todo = Outlook(sum(expected)), is_done.count(False)
    print(f"{todo} of {len(steps)} steps to do: {about(outlook.expected)} on two cores", flush=True)
    for number, (step, identity, done) in enumerate(zip(steps, identities, is_done, strict=True), start=1):
        label = f"[{number}/{len(steps)}] {step.what}"
        if done:
            print(f"{label}: done already", flush=True)
            continue
        print(f"{label}\n    {' '.join(_shown(part) for part in step.command)}", flush=True)
        start = time.monotonic()
        if step.trains is not None:
            _claim(ROOT / step.trains, stamps / f"{step.name}.started", identity)
        _run(step, outlook, expected[number - 1])
        write_text(stamps / f"{step.name}.done", identity)
        seconds = time.monotonic() - start
        outlook.end(expected[number - 1], seconds)
        todo -= 1
        print(f"{label}: {seconds:.0f} s" + (f", {about(outlook.left())} left" if todo else ""), flush=True)


def _run(step: Step, outlook: Outlook, expected: float) -> None:
    before = step.reached()

    def say(elapsed: float) -> None:
        reached = step.reached()
        fraction = (reached - before) / (1 - before) if reached > before else None
        print(f"    {about(outlook.left(expected, elapsed, fraction))} left of the quickstart", flush=True)

    def on_interrupt() -> None:
        ticker.stop()
        print(f"interrupted: step {step.name} stops; run again to continue", file=sys.stderr, flush=True)

    with Ticker(say) as ticker:
        status = call(step.command, cwd=ROOT, environment=_environment(), on_interrupt=on_interrupt)
    if status and not (step.trains is not None and status == cli.STOPPED):
        raise MostError(f"step {step.name} failed with status {status}; fix the error above and run again")
    if step.trains is not None and step.training_steps is not None:
        _require_trained(step.name, ROOT / step.trains, step.training_steps)


def _claim(run_dir: Path, started: Path, identity: str) -> None:
    """Record whose work ``run_dir`` holds; raise MostError if it is that of a step with another identity."""
    if _read(started) not in (None, identity):
        from megatron_most.checkpointing.directory import checkpoints_directory

        folder = checkpoints_directory(run_dir)
        if folder.is_dir() and any(folder.iterdir()):
            raise MostError(
                f"{run_dir} was trained with another configuration or other data: remove it or use --run-dir"
            )
    write_text(started, identity)


def _read(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


def _require_trained(name: str, run_dir: Path, steps: int) -> None:
    from megatron_most.checkpointing import read_metadata

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
    parser = argparse.ArgumentParser(
        description=f"train, evaluate and hear a tiny MoST on this machine: about {MINUTES} minutes on two cores"
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("overrides", nargs="*", help="training configuration, as key=value")
    cli.run(parser, quickstart)
