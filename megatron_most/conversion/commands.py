"""The subcommands of tools/convert_checkpoint.py."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path

from megatron_most import parallel, platform
from megatron_most.checkpointing import directory as directories
from megatron_most.checkpointing import read_metadata, resolve
from megatron_most.checkpointing.streaming import STATE
from megatron_most.cli import require_positive
from megatron_most.config import ParallelConfig
from megatron_most.conversion.architectures import read_foreign
from megatron_most.conversion.export_plan import stored_config
from megatron_most.conversion.exporting import export_model
from megatron_most.conversion.hugging_face import CONFIG, HuggingFaceModel
from megatron_most.conversion.import_config import ImportOptions
from megatron_most.conversion.importing import import_model
from megatron_most.conversion.inspection import describe
from megatron_most.conversion.verification import (
    compare,
    random_tokens,
    read_tokens,
    require_close,
    require_transformers,
)
from megatron_most.errors import ConfigError
from megatron_most.files import require_writable, write_json


def import_command(arguments: argparse.Namespace) -> None:
    options = ImportOptions(
        experts=arguments.experts,
        audio_vocab=arguments.audio_vocab,
        config=arguments.config,
        overrides=arguments.overrides,
        usage=arguments.usage,
        noise=arguments.noise,
        seed=arguments.seed,
        allow_pickle=arguments.allow_pickle,
    )
    import_model(arguments.hf, arguments.out, options)


def export_command(arguments: argparse.Namespace) -> None:
    export_model(
        arguments.checkpoint,
        arguments.out,
        arguments.format,
        arguments.dtype,
        arguments.max_shard_size,
        arguments.experts,
        not arguments.without_extension,
    )


def verify_command(arguments: argparse.Namespace) -> None:
    """Compare logits; print a line, write the report, and fail above the tolerance."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("verify: holds whole models in one process; start it without torchrun")
    require_positive(arguments, "tolerance")
    require_transformers()
    if arguments.report:
        require_writable(arguments.report)
    source = HuggingFaceModel(arguments.hf, arguments.allow_pickle)
    _, foreign = read_foreign(source.config, str(source.path_of(CONFIG)))
    directory = resolve(arguments.checkpoint)
    config = stored_config(directory, read_metadata(directory))
    directories.verify_checksums(directory)
    tokens = random_tokens(config, foreign) if arguments.tokens is None else read_tokens(arguments.tokens)
    platform.install()
    parallel.initialize(ParallelConfig(), seed=0)
    try:
        comparison = compare(source, foreign, config, directory / STATE, tokens)
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
    require_close(comparison, arguments.tolerance, f"{arguments.hf} and {arguments.checkpoint}")


def inspect_command(arguments: argparse.Namespace) -> None:
    found = describe(Path(arguments.directory), arguments.checksums, arguments.allow_pickle)
    if arguments.json:
        print(json.dumps(found, indent=1))
        return
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value}")


COMMANDS = {
    "import": import_command,
    "export": export_command,
    "verify": verify_command,
    "inspect": inspect_command,
}
