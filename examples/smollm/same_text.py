"""Whether training has left a base's text as it was: every logit of every text id, compared bit for bit.

    python examples/smollm/same_text.py --base runs/smollm/base --run-dir runs/smollm --output same_text.json

Both models read the same English. Ends with status 1 where a logit differs, after the file is written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megatron_most.checkpointing import resolve  # noqa: E402
from megatron_most.cli import run  # noqa: E402
from megatron_most.errors import CheckpointError  # noqa: E402
from megatron_most.files import write_json  # noqa: E402
from megatron_most.inference import load_for_generation  # noqa: E402
from megatron_most.vocab import NO_CODE  # noqa: E402

TEXTS = (
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))  # 5",
    "In the beginning was a small machine with two cores, and it learned to listen before it learned to speak.",
    "Water boils at 100 degrees Celsius at sea level; at 3,000 meters it boils at about 90 degrees.",
)


def text_logits(checkpoint: Path) -> list[torch.Tensor]:
    """Logits ``[positions, text ids]`` of each text."""
    loaded = load_for_generation(checkpoint, needs_codec=False)
    vocab, found = loaded.config.vocab, []
    for text in TEXTS:
        ids = torch.tensor([loaded.tokenizer.encode(text)])
        codes = torch.full((*ids.shape, vocab.num_codebooks), NO_CODE)
        logits, _ = loaded.generator.logits(ids, codes, torch.zeros_like(ids, dtype=torch.bool))
        found.append(logits[0, :, : vocab.text_vocab_size].float().cpu().clone())
    return found


def compare(base: list[torch.Tensor], trained: list[torch.Tensor]) -> dict[str, Any]:
    """How many logits there are, how many differ, and by how much at most."""
    differences = [(one - other).abs() for one, other in zip(base, trained, strict=True)]
    return {
        "texts": len(base),
        "logits": sum(one.numel() for one in base),
        "different": sum(int((one != other).sum()) for one, other in zip(base, trained, strict=True)),
        "largest_difference": max(float(one.max()) for one in differences),
    }


def main(arguments: argparse.Namespace) -> None:
    result = compare(text_logits(arguments.base), text_logits(resolve(arguments.run_dir)))
    write_json(arguments.output, result)
    if result["different"]:
        raise CheckpointError(
            f"{arguments.run_dir}: {result['different']} of {result['logits']} text logits are not those of"
            f" {arguments.base}; the largest difference is {result['largest_difference']:.3g}"
        )
    print(f"all {result['logits']} text logits are those of {arguments.base}, bit for bit")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="compare a trained model's text logits with its base's, bit for bit")
    parser.add_argument("--base", type=Path, required=True, help="checkpoint that training started from")
    parser.add_argument("--run-dir", type=Path, required=True, help="run, whose newest checkpoint is compared")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    run(parser, main)
