#!/usr/bin/env python
"""Checkpoints from and to Hugging Face formats: convert, compare, look into them.

    python tools/convert_checkpoint.py import --hf base --out most --experts expand --audio-vocab frame:4x4032
    python tools/convert_checkpoint.py export --checkpoint runs/most --format deepseek-v2 --out model
    python tools/convert_checkpoint.py verify --hf model --checkpoint runs/most
    python tools/convert_checkpoint.py inspect runs/most

docs/conversion.md explains what is kept and what changes. import and export run under torchrun, too.
"""

import argparse

from megatron_most.cli import run


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands_of = parser.add_subparsers(dest="command", required=True)

    sub = commands_of.add_parser("import", help="Hugging Face model -> native checkpoint")
    sub.add_argument("--hf", required=True, help="folder of a DeepSeek-V2, MoST or Llama model")
    sub.add_argument("--out", required=True, help="checkpoint directory to make")
    sub.add_argument("--experts", choices=("partition", "expand", "upcycle"), help="where the expert groups come from")
    sub.add_argument("--audio-vocab", help="LAYOUT:CODEBOOKSxSIZE, as frame:4x4032")
    sub.add_argument("--config", help="YAML file with sections of a run configuration")
    sub.add_argument("--usage", help="JSON file: modality -> for each MoE layer how often each expert was chosen")
    sub.add_argument("--noise", type=float, default=0.0, help="on copied experts, as a share of their size (default 0)")
    sub.add_argument("--seed", type=int, default=1234, help="of new weights and noise (default %(default)s)")
    sub.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin, weights only")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration")

    sub = commands_of.add_parser("export", help="native checkpoint -> Hugging Face model")
    sub.add_argument("--checkpoint", required=True, help="checkpoint directory, or a run directory for its newest")
    sub.add_argument("--format", required=True, choices=("deepseek-v2", "most", "llama"))
    sub.add_argument("--out", required=True, help="folder to make")
    sub.add_argument("--dtype", choices=("bf16", "fp32"), help="default: as stored")
    sub.add_argument("--max-shard-size", default="5GB", help="default %(default)s")
    sub.add_argument("--experts", choices=("text", "all"), default="text", help="deepseek-v2: those text may choose")
    sub.add_argument("--without-extension", action="store_true", help="give up what the format has no place for")

    sub = commands_of.add_parser("verify", help="compare the logits of both on the same tokens")
    sub.add_argument("--hf", required=True)
    sub.add_argument("--checkpoint", required=True)
    sub.add_argument("--tokens", help="file of JSON lists of ids, a line each (default: random ids)")
    sub.add_argument("--tolerance", type=float, default=1e-4, help="of the largest logit (default %(default)s)")
    sub.add_argument("--report", help="JSON file to write")
    sub.add_argument("--allow-pickle", action="store_true")

    sub = commands_of.add_parser("inspect", help="what a checkpoint or model is")
    sub.add_argument("directory")
    sub.add_argument("--json", action="store_true")
    sub.add_argument("--checksums", action="store_true", help="read everything and compare with the checksums")
    sub.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin, weights only")
    return parser


def convert(arguments: argparse.Namespace) -> None:
    from megatron_most.conversion.commands import COMMANDS  # imports torch and Megatron: --help need not wait for it

    COMMANDS[arguments.command](arguments)


if __name__ == "__main__":
    run(make_parser(), convert)
