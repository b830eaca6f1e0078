"""Loads a model for generation and evaluation: a checkpoint of a run, or a Hugging Face export of one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from megatron_most import parallel, platform
from megatron_most.audio import AudioCodec, load_codec
from megatron_most.checkpointing import CheckpointMetadata, load_model_weights, read_metadata
from megatron_most.config import ParallelConfig, RunConfig
from megatron_most.config.load import build_config
from megatron_most.errors import ConfigError
from megatron_most.inference.generator import Generator
from megatron_most.model import build_model
from megatron_most.text import TextTokenizer, load_tokenizer
from megatron_most.text.stop_ids import stop_ids


class MissingCodec(ConfigError):
    """A model names no codec, and none is given: it can read and write, not hear and speak."""

    def __init__(self, source: str) -> None:
        super().__init__(f"{source}: has no codec; pass one with --codec")


@dataclass
class LoadedModel:
    """A model ready to generate, with the tokenizer and codec of its training.

    metadata: of the checkpoint; None for an export.
    """

    generator: Generator
    tokenizer: TextTokenizer
    codec: AudioCodec
    config: RunConfig
    metadata: CheckpointMetadata | None
    stop_ids: tuple[int, ...] = ()
    """Ids that end a text as the tokenizer's end of sequence does; see :func:`megatron_most.text.stop_ids.stop_ids`."""


def load_for_generation(
    checkpoint: str | Path,
    tokenizer: str | None = None,
    codec: str | None = None,
    *,
    random_weights: bool = False,
    layout: ParallelConfig | None = None,
    needs_codec: bool = True,
) -> LoadedModel:
    """Load a checkpoint of any parallel layout, or a Hugging Face export, onto this process or the ranks of ``layout``.

    Args:
        checkpoint: a checkpoint directory, a run directory for its newest checkpoint, or the folder of an export.
        tokenizer, codec: their current paths, if they have moved since training. The content must be the same.
        random_weights: keep the initial weights instead, as the baseline of an untrained model; not of an export.
        layout: tensor- and expert-parallel sizes; by default every process holds the whole model.
        needs_codec: False for text alone: then no codec is loaded.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or was trained with another tokenizer or codec.
        MissingCodec: the checkpoint names no codec, and none is given.
        ConfigError: the same of the tokenizer; or ``layout`` splits what generation cannot split, or does not fit the
            number of ranks.
    """
    if (Path(checkpoint) / "config.json").is_file():  # neither a run nor a checkpoint has one
        from megatron_most.inference.hugging_face import load_export

        assert not random_weights, "an export has no configuration of a run to begin from"
        if layout not in (None, ParallelConfig()):
            raise ConfigError(f"{checkpoint}: an export is not split over ranks; use the checkpoint that it is of")
        return load_export(checkpoint, tokenizer, codec, needs_codec=needs_codec)
    metadata = read_metadata(checkpoint)
    names: dict[str, Any] = {
        "tokenizer": tokenizer or metadata.config["tokenizer"],
        "codec": (codec or metadata.config["codec"]) if needs_codec else None,
    }
    if names["tokenizer"] is None:
        raise ConfigError(f"{checkpoint}: has no tokenizer; pass one with --tokenizer")
    if needs_codec and names["codec"] is None:
        raise MissingCodec(str(checkpoint))
    layout = layout or ParallelConfig()
    config = config_for_generation(str(checkpoint), {**metadata.config, **names}, layout)
    platform.install()
    parallel.initialize(config.parallel, config.seed)
    chunks = build_model(config, for_inference=True)
    if not random_weights:
        load_model_weights(checkpoint, config, chunks)
    text_tokenizer = load_tokenizer(names["tokenizer"])
    # Ranks that hold a model together exchange rows whose number the host reads, which no CUDA graph can hold.
    return LoadedModel(
        Generator(chunks[0], cuda_graph=parallel.whole_model_group().size() == 1),
        text_tokenizer,
        load_codec(names["codec"]) if needs_codec else no_codec(str(checkpoint)),
        config,
        metadata,
        stop_ids(names["tokenizer"], text_tokenizer),
    )


def no_codec(source: str) -> AudioCodec:
    """What stands for the codec of a model that is loaded for text alone: whatever is asked of it is an error."""
    return cast(AudioCodec, _NoCodec(source))


class _NoCodec:
    def __init__(self, source: str) -> None:
        self._source = source

    def __getattr__(self, name: str) -> Any:
        raise ConfigError(f"{self._source}: was loaded without a codec")


def config_for_generation(source: str, trained_with: dict[str, Any], layout: ParallelConfig | None = None) -> RunConfig:
    """The configuration of a training run, changed for generation.

    - Tensor and expert parallelism as ``layout`` says, and the ``alltoall`` dispatcher, which needs no library.
    - Torch's operators where training may have used kernels for a GPU.
    - Portable layers: Transformer Engine's attention does not take a padding mask together with a cache.
    - No FP8: it needs a multiple of the alignment in positions, and a generation step has one.

    Args:
        source: the name to use in error messages.
        trained_with: see :attr:`CheckpointMetadata.config`.
    """
    layout = layout or ParallelConfig()
    if (
        layout.model_parallel_size != layout.tensor_model_parallel_size
        or layout.expert_tensor_parallel_size is not None
    ):
        raise ConfigError("parallel: generation splits a model over tensor- and expert-parallel ranks alone")
    values = {name: value for name, value in trained_with.items() if name not in ("parallel", "data", "precision")}
    values["parallel"] = asdict(layout)
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
