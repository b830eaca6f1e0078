"""What docs/first-run.md downloads, as small as it can be, and the two programs that stand in for the network.

``hf`` and ``curl`` are put first on PATH; they take the page's arguments and give these files:

    deepseek-ai/DeepSeek-V2-Lite    random weights of its architecture in shards, ``config.json`` in the form published
                                    (with remote code that must not run), its kind of tokenizer
    nvidia/nemo-nano-codec-...      the quickstart's codec: 4 codebooks of 1000 codes, 25 frames a second
    facebook/hubert-large-ls960-ft  random weights of its architecture, with its kind of processor
    openslr.org/resources/12/...    LibriSpeech's folders, FLAC files and capitals, some sentences a split
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import soundfile
import torch

from examples.quickstart.espeak import Espeak
from examples.quickstart.make_corpus import SAMPLE_RATE, render
from tests.pages import ROOT
from tests.unit.conversion.models import deepseek
from tests.unit.evaluation.ctc_model import write_ctc_model
from tests.unit.planning.test_recipes import DEEPSEEK_V2_LITE
from tests.unit.text.test_tokenizer import BOS, EOS, LAYOUTS

MODEL, CODEC = "deepseek-ai/DeepSeek-V2-Lite", "nvidia/nemo-nano-codec-22khz-1.78kbps-12.5fps"
RECOGNIZER = "facebook/hubert-large-ls960-ft"
TOY_SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}
UTTERANCES = {
    "train-clean-100": 6, "train-clean-360": 2, "train-other-500": 2,
    "dev-clean": 2, "dev-other": 2, "test-clean": 2, "test-other": 2,
}  # fmt: skip
SUBJECTS = ("THE OLD CAPTAIN", "MY SISTER", "A TIRED HORSE", "THE DOCTOR'S BOY", "NOBODY", "THE TALL WOMAN")
ENDS = ("WENT HOME", "SAW THE RIVER", "ASKED FOR WATER")

HF = """#!/bin/bash
# hf download REPOSITORY --local-dir FOLDER
[[ $# = 4 && $1 = download && $3 = --local-dir && -d DOWNLOADS/$2 ]] || { echo "no such download: $*" >&2; exit 1; }
mkdir -p "$4/.cache/huggingface/download" && touch "$4/.cache/huggingface/.gitignore" && cp -r DOWNLOADS/$2/. "$4"
"""
CURL = """#!/bin/bash
# curl [-OPTIONS] https://HOST/PATH
file=DOWNLOADS/${@: -1}
file=${file/https:\\/\\//}
[[ -f $file ]] || { echo "no such download: $*" >&2; exit 22; }
cat "$file"
"""


def make_downloads(folder: Path) -> None:
    """Write the stand-ins ``hf`` and ``curl``, and the files that they give, to ``folder``."""
    _model(folder / MODEL)
    (folder / CODEC).mkdir(parents=True)
    shutil.copy(ROOT / "examples/quickstart/codec/tiny_codec.nemo", folder / CODEC / f"{Path(CODEC).name}.nemo")
    write_ctc_model(folder / RECOGNIZER)
    _librispeech(folder / "www.openslr.org/resources/12")
    for name, text in (("hf", HF), ("curl", CURL)):
        (folder / name).write_text(text.replace("DOWNLOADS", str(folder)))
        (folder / name).chmod(0o755)


def _model(folder: Path) -> None:
    config = DEEPSEEK_V2_LITE | TOY_SIZES | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM"},
        "max_position_embeddings": 163840,
        "tie_word_embeddings": False,
    }  # fmt: skip
    model = deepseek(folder.with_suffix(".scratch"), torch.bfloat16, **TOY_SIZES)
    model.save_pretrained(folder, max_shard_size="200KB")
    shutil.rmtree(folder.with_suffix(".scratch"))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_deepseek.py").write_text("raise SystemExit('code that came with a model was run')\n")
    (folder / "README.md").write_text("# DeepSeek-V2-Lite\n")
    LAYOUTS["deepseek"](folder)
    markers = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    added = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    settings = {name: added | {"content": token} for name, token in markers.items()}
    settings |= {"tokenizer_class": "LlamaTokenizerFast", "model_max_length": 16384, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _librispeech(folder: Path) -> None:
    folder.mkdir(parents=True)
    engine = Espeak()
    sentences = iter([f"{subject} {end}" for end in ENDS for subject in SUBJECTS])
    for number, (split, count) in enumerate(UTTERANCES.items()):
        speaker, chapter = 19 + number, 198 + number
        place = folder / "LibriSpeech" / split / str(speaker) / str(chapter)
        place.mkdir(parents=True)
        lines = []
        for index in range(count):
            name, text = f"{speaker}-{chapter}-{index:04d}", next(sentences)
            speech = render(engine, {"text": text.lower(), "speed": 180, "pitch": 40 + number, "offset": 0})
            soundfile.write(place / f"{name}.flac", speech, SAMPLE_RATE, subtype="PCM_16")
            lines.append(f"{name} {text}\n")
        (place / f"{speaker}-{chapter}.trans.txt").write_text("".join(lines))
        (folder / "LibriSpeech" / "README.TXT").write_text("1. Structure\n")
        with tarfile.open(folder / f"{split}.tar.gz", "w:gz") as archive:
            archive.add(folder / "LibriSpeech", "LibriSpeech")
        shutil.rmtree(folder / "LibriSpeech")
