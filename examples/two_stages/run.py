"""The paper's two stages on one small machine: spoken chat, stage 1, stage 2, and what each does to every suite.

    python examples/two_stages/run.py [--run-dir DIR] [--quick]

Each step is a command that a user could type, printed before it runs. An interrupted run resumes when it is started
again; see ``examples/steps.py``. ``--quick`` takes a few samples and a few steps: it shows that all parts work, and
its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from examples.steps import SHORT, Step, most, run_steps  # noqa: E402
from megatron_most import cli  # noqa: E402
from megatron_most.config import load_config  # noqa: E402

HERE = Path("examples/two_stages")
CONFIG = Path("examples/configs/quickstart.yaml")
CODEC = Path("examples/quickstart/codec/tiny_codec.nemo")

STAGE_1 = {"train_asr": 0.4, "train_tts": 0.4, "train_text": 0.2}
STAGE_2 = {"chat_spoken": 0.4, "chat_written": 0.4, "train_asr": 0.1, "train_tts": 0.1}
"""The paper's weights (examples/configs/most_16b_stage1.yaml and most_16b_stage2.yaml)."""

ROLE_MARKERS = 3
"""Ids of text that the tokenizer leaves to chat."""

SECONDS = {"corpus": 28, "data": 100, "stage1": 300, "evaluate1": 130, "stage2": 205, "evaluate2": 70, "same": 30}
"""What the long steps are expected to take on two cores, by what the quickstart's steps take; not measured."""
MINUTES = 15
QUICK_SECONDS = 20
"""What such a step takes with few samples: imports, for the most part."""


@dataclass(frozen=True)
class Size:
    """How much of everything.

    Args:
        sentences: of the corpus, to train on.
        samples: of an evaluation set, about.
        compared: samples of each set that the export is asked, too.
        limit: samples of each set that are judged; None for all.
        steps: of each stage.
    """

    sentences: int
    conversations: int
    samples: int
    compared: int
    limit: int | None
    steps: tuple[int, int]


DEFAULT = Size(sentences=2400, conversations=1500, samples=36, compared=8, limit=None, steps=(760, 500))
QUICK = Size(sentences=16, conversations=8, samples=3, compared=2, limit=3, steps=(4, 4))


def make_steps(run_dir: Path, size: Size, overrides: list[str]) -> list[Step]:
    """The commands in order. Each depends on those before it."""
    python, corpus, sets = sys.executable, run_dir / "corpus", run_dir / "sets"
    limit = [] if size.limit is None else ["--limit", str(size.limit)]
    speak = [python, "examples/quickstart/make_corpus.py", "--output", str(corpus), "--splits", "train", "heldout_s"]
    speak += ["--limit", str(size.sentences)]
    ask = [python, f"{HERE}/make_chat.py", "--corpus", str(corpus), "--output", str(run_dir / "chat")]
    ask += ["--conversations", str(size.conversations)]
    publish = [python, f"{HERE}/make_sets.py", "--corpus", str(corpus), "--output", str(sets)]
    publish += ["--count", str(size.samples)]

    def judged(name: str, output: str, *options: str) -> list[str]:
        judge = [python, f"{HERE}/evaluate.py", "--run-dir", str(run_dir), "--checkpoint", str(run_dir / name)]
        return [*judge, "--output", output, *options]

    export = ["convert", "export", "--checkpoint", f"{run_dir}/stage2", "--format", "hf", "--out", f"{run_dir}/export"]
    untrained, stage1, stage2 = (f"{run_dir}/{model}/evaluation" for model in ("untrained", "stage1", "stage2"))
    same = ["--limit", str(size.compared), "--same-as", stage2]
    page = ["compare", untrained, stage1, stage2, "--output", f"{run_dir}/comparison.html"]
    steps = [
        Step("corpus", "speak the sentences of the quickstart's corpus", speak),
        Step("chat", "write conversations about them", ask, [HERE / "world.py"]),
        Step("sets", "make evaluation sets in the published layouts", publish, [HERE / "world.py"]),
        Step("data", "speak the conversations, and build the datasets", most(*_preparation(run_dir)), [CODEC]),
        _training(run_dir, 1, size.steps[0], STAGE_1, overrides),
        Step(
            "evaluate1",
            "judge the untrained model and stage 1",
            judged("stage1", stage1, "--untrained", untrained, *limit),
        ),
        _training(run_dir, 2, size.steps[1], STAGE_2, overrides),
        Step("evaluate2", "judge stage 2", judged("stage2", stage2, *limit)),
        Step("export", "export to Hugging Face", most(export), replaces=run_dir / "export"),
        Step(
            "same",
            "ask the export what the checkpoint was asked",
            judged("export", f"{run_dir}/export_evaluation", *same),
        ),
        Step("compare", "compare the models on a page", most(page)),
        Step("table", "what each stage does", [python, f"{HERE}/table.py", "--run-dir", str(run_dir)]),
    ]
    expected = SECONDS if size == DEFAULT else dict.fromkeys(SECONDS, QUICK_SECONDS)
    return [dataclasses.replace(step, expected=expected.get(step.name, SHORT)) for step in steps]


def _preparation(run_dir: Path) -> list[list[str]]:
    """Conversations and corpus -> a tokenizer, codes, and a dataset for each task."""
    vocab = load_config(ROOT / CONFIG).vocab
    corpus, chat, spoken, data = (run_dir / name for name in ("corpus", "chat", "spoken", "data"))
    tokenizer = f"{data}/tokenizer.model"
    build = ["prepare", "build", "--overwrite", "--tokenizer", tokenizer]
    build += ["--text-vocab-size", str(vocab.text_vocab_size), "--task"]
    sizes = ["--num-codebooks", str(vocab.num_codebooks), "--codebook-size", str(vocab.codebook_size)]
    learn = ["prepare", "tokenizer", "--manifest", f"{corpus}/train.jsonl", f"{chat}/texts.jsonl"]
    learn += ["--vocab-size", str(vocab.text_vocab_size - ROLE_MARKERS), "--output", tokenizer]
    speak = ["prepare", "speechify", "--chat", f"{chat}/chat.jsonl", "--output", str(spoken)]
    speak += ["--synthesizer", shlex.join([sys.executable, f"{HERE}/synthesizer.py"])]

    def encoded(manifest: str, name: str) -> list[str]:
        return [
            "prepare",
            "tokenize",
            "--manifest",
            manifest,
            "--codec",
            str(CODEC),
            "--output",
            f"{data}/codes/{name}",
        ]

    def built(task: str, name: str, *inputs: str) -> list[str]:
        return [*build, task, *inputs, "--output", f"{data}/{name}"]

    heard = ["--chat", f"{spoken}/chats.jsonl", "--codes", f"{data}/codes/chat", "--modes", "S-T", "S-S"]
    return [
        learn,
        speak,
        encoded(f"{corpus}/train.jsonl", "train"),
        encoded(f"{spoken}/manifest.jsonl", "chat"),
        built("asr", "train_asr", "--codes", f"{data}/codes/train"),
        built("tts", "train_tts", "--codes", f"{data}/codes/train"),
        built("text_lm", "train_text", "--text", f"{corpus}/train.jsonl", *sizes),
        built("chat", "chat_spoken", *heard),
        built("chat", "chat_written", "--chat", f"{chat}/chat.jsonl", "--modes", "T-T", *sizes),
    ]


def _training(run_dir: Path, stage: int, steps: int, blend: Mapping[str, float], overrides: list[str]) -> Step:
    """Stage 1 begins with random weights, stage 2 with those of stage 1 and a new optimizer."""
    datasets = ", ".join(f"{{path: {run_dir}/data/{name}, weight: {weight}}}" for name, weight in blend.items())
    train = [sys.executable, "-m", "megatron_most.commands.torchrun", "--standalone", "--nproc-per-node", "2"]
    train += ["-m", "megatron_most.commands.train", "--config", str(CONFIG), f"run_dir={run_dir}/stage{stage}"]
    train += [f"tokenizer={run_dir}/data/tokenizer.model", f"data.train=[{datasets}]", "data.validation=[]"]
    train += ["training.eval_interval=0", f"training.train_iters={steps}"]
    train += [f"checkpoint.load={run_dir}/stage1", "optimizer.lr=1e-3"] if stage == 2 else []
    if steps < 100:
        train += [f"optimizer.lr_warmup_iters={steps // 2}", f"checkpoint.save_interval={steps}"]
    name = {1: "ASR, TTS and text", 2: "spoken and written instructions, ASR and TTS"}[stage]
    what = f"stage {stage}: {name}"
    return Step(f"stage{stage}", what, [*train, *overrides], [CONFIG], run_dir / f"stage{stage}", steps)


def two_stages(arguments: argparse.Namespace) -> None:
    start, run_dir = time.monotonic(), arguments.run_dir
    steps = make_steps(run_dir, QUICK if arguments.quick else DEFAULT, arguments.overrides)
    run_steps(steps, run_dir if run_dir.is_absolute() else ROOT / run_dir)
    print(f"finished in {time.monotonic() - start:.0f} s; the table is {run_dir}/table.md. Talk to the model:")
    print(f"    most generate --checkpoint {run_dir}/stage2 --task chat --interactive --max-new-tokens 16")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=f"train a tiny MoST in two stages and judge it after each: about {MINUTES} minutes on two cores"
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs/two_stages"))
    parser.add_argument("--quick", action="store_true", help="a few samples and steps, to see that all parts work")
    parser.add_argument("overrides", nargs="*", help="training configuration of both stages, as key=value")
    cli.run(parser, two_stages)
