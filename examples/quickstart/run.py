"""All of megatron_most on one small machine: synthesize a corpus, tokenize it, train, evaluate, speak, report.

    make quickstart                # or: python examples/quickstart/run.py [--run-dir DIR] [key=value ...]

Each step is a command that a user could type, printed before it runs. Complete steps are skipped, so an interrupted
quickstart resumes when it is run again. A step is repeated if its command or one of its input files has changed.
Checkpoints of another configuration or other data are an error.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.steps import ROOT, SHORT, Step, run_steps  # noqa: E402
from megatron_most import cli  # noqa: E402
from megatron_most.config import load_config  # noqa: E402

QUICKSTART = Path("examples/quickstart")
CONFIG = Path("examples/configs/quickstart.yaml")
CODEC = QUICKSTART / "codec" / "tiny_codec.nemo"
SPLITS = ("train", "heldout_s", "heldout_p")
SPEECH_DATASETS = (("train", "asr"), ("train", "tts"), ("heldout_s", "asr"), ("heldout_s", "tts"))

SECONDS = {"corpus": 45, "codes_train": 75, "codes_heldout_s": 25, "train": 390, "evaluate": 320}
"""What the long steps take on two cores. README tells their sum with that of the others, :data:`MINUTES`."""
MINUTES = 15


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
    for step in steps:
        step.takes = SECONDS.get(step.name, SHORT)
    return steps


def quickstart(arguments: argparse.Namespace) -> None:
    start = time.monotonic()
    run_dir = arguments.run_dir
    run_steps(make_steps(run_dir, arguments.overrides), ROOT / run_dir, "the quickstart")
    print(f"finished in {time.monotonic() - start:.0f} s; open {run_dir}/report.html, hear {run_dir}/samples/")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=f"train, evaluate and hear a tiny MoST on this machine: about {MINUTES} minutes on two cores"
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("overrides", nargs="*", help="training configuration, as key=value")
    cli.run(parser, quickstart)
