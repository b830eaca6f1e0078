"""Loads a checkpoint for generation in one process."""

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
    """A model ready to generate, with the tokenizer and codec of its training."""

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
    """Load a checkpoint of any parallel layout onto this process.

    Args:
        checkpoint: a checkpoint directory, or a run directory for its newest checkpoint.
        tokenizer, codec: their current paths, if they have moved since training. The content must be the same.
        random_weights: keep the initial weights instead, as the baseline of an untrained model.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or was trained with another tokenizer or codec.
        ConfigError: the checkpoint names no tokenizer or codec, and none is given.
    """
    metadata = read_metadata(checkpoint)
    names = {
        "tokenizer": tokenizer or metadata.config["tokenizer"],
        "codec": codec or metadata.config["codec"],
    }
    for what, name in names.items():
        if name is None:
            raise ConfigError(f"{checkpoint}: has no {what}; pass one with --{what}")
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
    """The configuration of a training run, changed for generation in one process.

    - No parallelism, and the ``alltoall`` dispatcher, which needs no library.
    - Torch's operators where training may have used kernels for a GPU.
    - Portable layers: Transformer Engine's attention does not take a padding mask together with a cache.
    - No FP8: it needs a multiple of the alignment in positions, and a generation step has one.

    Args:
        source: the name to use in error messages.
        trained_with: see :attr:`CheckpointMetadata.config`.
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
        "model.moe.moe_permute_fusion=null",
        "model.moe.moe_router_fusion=false",
    ]
    if trained_with["model"]["moe"]["expert_backend"] == "transformer_engine":
        overrides.append("model.moe.expert_backend=grouped")
    return build_config(source, values, overrides)
