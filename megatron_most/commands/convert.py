"""Convert checkpoints from and to Hugging Face formats, compare and inspect them.

    most convert import --hf base --out most --experts expand --audio-vocab frame:4x4032
    most convert export --checkpoint runs/most --format hf --out model
    most convert verify --hf model --checkpoint runs/most
    most convert inspect runs/most

docs/conversion.md explains what is kept and what changes. torchrun runs import and export on several processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_most import cli
from megatron_most.errors import ConfigError
from megatron_most.extras import require
from megatron_most.files import require_writable, write_json

FORMATS = (
    "hf", "most", "deepseek-v2", "deepseek-v3", "qwen2-moe", "qwen3-moe", "mixtral", "olmoe", "llama", "qwen2", "qwen3"
)  # fmt: skip
"""Names of the classes in conversion/architectures, which import torch."""


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("convert", __doc__)
    commands_of = parser.add_subparsers(dest="command", required=True)
    _add_import(commands_of.add_parser("import", help="Hugging Face model -> MoST checkpoint"))
    _add_export(commands_of.add_parser("export", help="MoST checkpoint -> Hugging Face model"))
    _add_verify(commands_of.add_parser("verify", help="compare the logits of a Hugging Face model and a checkpoint"))
    _add_inspect(commands_of.add_parser("inspect", help="describe a checkpoint or model"))
    return parser


def _add_import(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--hf",
        required=True,
        help="folder of a model (docs/conversion.md lists the architectures), or of an exported one",
    )
    sub.add_argument("--out", required=True, help="checkpoint directory to write; must not exist")
    sub.add_argument(
        "--experts",
        choices=("partition", "expand", "upcycle"),
        help="how expert groups are made: split the base's experts, copy them for each modality, or copy its dense FFN",
    )
    sub.add_argument(
        "--audio-vocab", metavar="LAYOUT:CODEBOOKSxSIZE", help="audio part of the vocabulary, such as frame:4x4032"
    )
    sub.add_argument("--config", help="YAML file with sections of the run configuration")
    sub.add_argument("--usage", help="JSON file: modality -> for each MoE layer, how often each expert was chosen")
    sub.add_argument(
        "--noise",
        type=float,
        default=0.0,
        help="noise on copied experts, relative to the size of their weights (default %(default)g)",
    )
    sub.add_argument("--seed", type=int, default=1234, help="seed of new weights and noise (default %(default)s)")
    _add_allow_pickle(sub)
    _add_no_verify(sub)
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the configuration")


def _add_export(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--checkpoint", required=True, help="checkpoint directory, or run directory (its newest checkpoint)"
    )
    sub.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="hf: the whole model, with code for transformers; the others: an architecture that transformers has",
    )
    sub.add_argument("--out", required=True, help="folder to write; must not exist")
    sub.add_argument("--dtype", choices=("bf16", "fp32"), help="type of the weights (default: as stored)")
    sub.add_argument("--max-shard-size", default="5GB", help="maximum size of a weights file (default %(default)s)")
    sub.add_argument(
        "--experts",
        choices=("text", "all"),
        default="text",
        help="formats with experts: experts that text tokens may choose (default), or all",
    )
    sub.add_argument(
        "--without-extension",
        action="store_true",
        help="drop what the format has no place for, instead of writing it beside the model",
    )
    _add_no_verify(sub)


def _add_verify(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--hf", required=True, help="folder of the Hugging Face model")
    sub.add_argument(
        "--checkpoint", required=True, help="checkpoint directory, or run directory (its newest checkpoint)"
    )
    sub.add_argument("--tokens", help="file with a JSON list of token ids per line (default: random ids)")
    sub.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="maximum difference, relative to the largest logit (default %(default)s)",
    )
    sub.add_argument("--report", help="JSON file for the result")
    _add_allow_pickle(sub)


def _add_inspect(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("directory", help="MoST checkpoint, run directory, or folder of a Hugging Face model")
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.add_argument("--checksums", action="store_true", help="read all files and compare them with their checksums")
    _add_allow_pickle(sub)


def _add_allow_pickle(sub: argparse.ArgumentParser) -> None:
    text = "allow pytorch_model.bin; only weights are read, no code is run"
    sub.add_argument("--allow-pickle", action="store_true", help=text)


def _add_no_verify(sub: argparse.ArgumentParser) -> None:
    text = "do not compare the logits with those of transformers, which reads both models once more"
    sub.add_argument("--no-verify", action="store_true", help=text)


def import_command(arguments: argparse.Namespace) -> None:
    require("safetensors")
    from megatron_most.conversion.import_config import ImportOptions
    from megatron_most.conversion.importing import import_model

    options = ImportOptions(
        experts=arguments.experts,
        audio_vocab=arguments.audio_vocab,
        config=arguments.config,
        overrides=arguments.overrides,
        usage=arguments.usage,
        noise=arguments.noise,
        seed=arguments.seed,
        allow_pickle=arguments.allow_pickle,
        verify=not arguments.no_verify,
    )
    import_model(arguments.hf, arguments.out, options)


def export_command(arguments: argparse.Namespace) -> None:
    require("safetensors")
    from megatron_most.conversion.exporting import export_model

    export_model(
        arguments.checkpoint,
        arguments.out,
        arguments.format,
        arguments.dtype,
        arguments.max_shard_size,
        arguments.experts,
        not arguments.without_extension,
        not arguments.no_verify,
    )


def verify_command(arguments: argparse.Namespace) -> None:
    """Compare logits, print and write the result, and fail if they differ by more than the tolerance."""
    if cli.launcher_integer("WORLD_SIZE", 1, least=1) > 1:
        raise ConfigError("verify: runs in one process; start it without torchrun")
    cli.require_positive(arguments, "tolerance")
    require("safetensors", "transformers")
    from megatron_most import parallel, platform
    from megatron_most.checkpointing import directory as directories
    from megatron_most.checkpointing import read_metadata, resolve
    from megatron_most.checkpointing.directory import STATE
    from megatron_most.config import ParallelConfig
    from megatron_most.conversion import hugging_face, verification
    from megatron_most.conversion.architectures import read_foreign
    from megatron_most.conversion.export_plan import stored_config

    if arguments.report:
        require_writable(arguments.report)
    source = hugging_face.HuggingFaceModel(arguments.hf, arguments.allow_pickle)
    _, foreign = read_foreign(source.config, str(source.path_of(hugging_face.CONFIG)))
    directory = resolve(arguments.checkpoint)
    config = stored_config(directory, read_metadata(directory))
    directories.verify_checksums(directory)
    if arguments.tokens is None:
        tokens = verification.random_tokens(config, foreign)
    else:
        tokens = verification.read_tokens(arguments.tokens)
    platform.install()
    parallel.initialize(ParallelConfig(), seed=0)
    try:
        comparison = verification.compare(source, foreign, config, directory / STATE, tokens)
    finally:
        parallel.destroy()
    print(comparison.describe())
    for layer, value in enumerate(comparison.layers):
        print(f"layer {layer}: hidden states differ by at most {value:.1e} of the largest")
    if arguments.report:
        report = {
            **dataclasses.asdict(comparison),
            "relative_difference": comparison.relative_difference,
            "tolerance": arguments.tolerance,
            "first_layer_above_tolerance": comparison.first_difference(arguments.tolerance),
        }
        write_json(arguments.report, report)
    verification.require_close(comparison, arguments.tolerance, f"{arguments.hf} and {arguments.checkpoint}")


def inspect_command(arguments: argparse.Namespace) -> None:
    from megatron_most.conversion.inspection import describe

    found = describe(Path(arguments.directory), arguments.checksums, arguments.allow_pickle)
    if arguments.json:
        print(json.dumps(found, indent=1))
        return
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value}")


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "import": import_command,
    "export": export_command,
    "verify": verify_command,
    "inspect": inspect_command,
}


def convert(arguments: argparse.Namespace) -> None:
    COMMANDS[arguments.command](arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    cli.run(make_parser(), convert, arguments)


if __name__ == "__main__":
    main()
