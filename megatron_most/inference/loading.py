"""A checkpoint -> everything generation needs, in one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_most import parallel, platform
from megatron_most.audio import AudioCodec, load_codec
from megatron_most.checkpointing import CheckpointMetadata, load_model_weights, read_metadata
from megatron_most.config import RunConfig
from megatron_most.config.load import build_config
from megatron_most.errors import ConfigError
from megatron_most.inference.generator import Generator
from megatron_most.model import build_model
from megatron_most.text import TextTokenizer, load_tokenizer
from megatron_most.text.stop_ids import stop_ids


@dataclass
class LoadedModel:
    """A model ready to generate, with the tokenizer and codec it was trained with."""

    generator: Generator
    tokenizer: TextTokenizer
    codec: AudioCodec
    config: RunConfig
    metadata: CheckpointMetadata
    stop_ids: tuple[int, ...] = ()
    """Ids that end a text as the tokenizer's end of sequence does; see :func:`megatron_most.text.stop_ids.stop_ids`."""


def load_for_generation(
    checkpoint: str | Path, tokenizer: str | None = None, codec: str | None = None, random_weights: bool = False
) -> LoadedModel:
    """Load a checkpoint written under any parallel layout whole onto this process.

    Args:
        checkpoint: a checkpoint directory, or a run directory for its newest checkpoint.
        tokenizer, codec: where they are now, if not where training found them. Their content must be the same.
        random_weights: leave the weights as they are initialized: the baseline of an untrained model.

    Raises:
        CheckpointError: missing or broken checkpoint, or another tokenizer or codec than it was trained with.
        ConfigError: the checkpoint names no tokenizer or codec and none is given.
    """
    metadata = read_metadata(checkpoint)
    names = {
        "tokenizer": tokenizer or metadata.config["tokenizer"],
        "codec": codec or metadata.config["codec"],
    }
    for what, name in names.items():
        if name is None:
            raise ConfigError(f"{checkpoint}: names no {what}; give one with --{what}")
    config = config_for_generation(str(checkpoint), {**metadata.config, **names})
    platform.install()
    parallel.initialize(config.parallel, config.seed)
    chunks = build_model(config)
    if not random_weights:
        load_model_weights(checkpoint, config, chunks)
    text_tokenizer = load_tokenizer(names["tokenizer"])
    return LoadedModel(
        Generator(chunks[0]),
        text_tokenizer,
        load_codec(names["codec"]),
        config,
        metadata,
        stop_ids(names["tokenizer"], text_tokenizer),
    )


def config_for_generation(source: str, trained_with: dict[str, Any]) -> RunConfig:
    """The configuration of a training run without what served training, on one or many ranks.

    One process has no other rank to send tokens to, and needs no special library. The portable layers compute the same
    as Transformer Engine's, which take no mask of a batch's padding beside a cache. FP8 wants whole alignments of
    positions, and generation has one.

    Args:
        source: what errors call it.
        trained_with: as :attr:`CheckpointMetadata.config`.
    """
    values = {name: value for name, value in trained_with.items() if name not in ("parallel", "data", "precision")}
    values["data"] = {"seq_length": trained_with["data"]["seq_length"]}
    values["precision"] = {"dtype": trained_with["precision"]["dtype"]}
    overrides = [
        "training.recompute=none",
        "training.micro_batch_size=1",
        "model.transformer_impl=portable",
        "model.moe.moe_token_dispatcher_type=alltoall",
        "model.moe.moe_shared_expert_overlap=false",
    ]
    if trained_with["model"]["moe"]["expert_backend"] == "transformer_engine":
        overrides.append("model.moe.expert_backend=grouped")
    return build_config(source, values, overrides)
