"""The run configuration of an imported model, from the source's shape and the user's options."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_most.config import RunConfig
from megatron_most.config.load import build_config, check_shape, read_config_file
from megatron_most.conversion import hf_format
from megatron_most.conversion.architecture import Architecture, ForeignModel
from megatron_most.conversion.experts import default_groups
from megatron_most.conversion.hugging_face import HuggingFaceModel
from megatron_most.errors import ConfigError
from megatron_most.vocab import Modality, VocabLayout


@dataclass(frozen=True)
class ImportOptions:
    """The options of ``most convert import``.

    Args:
        experts: ``partition``, ``expand`` or ``upcycle``; None for a model that already has expert groups.
        audio_vocab: ``LAYOUT:CODEBOOKSxSIZE``, for example ``frame:4x4032``.
        config: YAML file with sections of a run configuration.
        overrides: ``section.key=value``.
        usage: JSON file that says how often each expert is used.
        noise: standard deviation of the noise added to copied experts, as a fraction (0 to 1) of the weights' root mean
            square.
        seed: seed of new weights and noise.
        allow_pickle: read ``pytorch_model.bin``.
        verify: compare the logits with those of ``transformers``.
    """

    experts: str | None = None
    audio_vocab: str | None = None
    config: str | None = None
    overrides: Sequence[str] = ()
    usage: str | None = None
    noise: float = 0.0
    seed: int = 1234
    allow_pickle: bool = False
    verify: bool = True


def import_mode(architecture: Architecture, has_extension: bool, options: ImportOptions) -> str:
    """Where the experts come from: one of the values of ``--experts``, ``extension`` or ``as they are``.

    Raises:
        ConfigError: an option does not fit the model, or another option.
    """
    valid = architecture.modes
    if has_extension:
        if options.config is not None or options.audio_vocab is not None:
            raise ConfigError(
                "--config, --audio-vocab: the extension beside the model already sets these; pass --experts to import"
                " the model without it"
            )
        mode = "extension"
    elif architecture.name == hf_format.NAME and (options.config is not None or options.audio_vocab is not None):
        raise ConfigError("--config, --audio-vocab: run_config in config.json already sets these")
    elif options.experts is None:
        if valid:
            raise ConfigError(f"--experts: a {architecture.name} model needs one of {', '.join(valid)}")
        mode = "as they are"
    elif options.experts not in valid:
        rule = f"must be {' or '.join(valid)}" if valid else "leave it out, the model has its own groups"
        raise ConfigError(f"--experts={options.experts}: for a {architecture.name} model {rule}")
    else:
        mode = options.experts
    if not 0 <= options.noise <= 1:
        raise ConfigError(f"--noise={options.noise}: must be a fraction of the weights' size, from 0 to 1")
    if options.noise and mode != "expand":
        raise ConfigError(f"--noise={options.noise}: is only for --experts expand, which makes copies")
    if options.usage is not None and mode not in ("partition", "expand"):
        raise ConfigError(f"--usage={options.usage}: is only for --experts partition and expand")
    return mode


def import_config(
    source: HuggingFaceModel, architecture: Architecture, foreign: ForeignModel, mode: str, options: ImportOptions
) -> RunConfig:
    """The configuration of the imported model: the source's shape, then the user's file, then the overrides.

    Raises:
        ConfigError: a value is invalid, or contradicts the source.
    """
    wanted = read_config_file(options.config) if options.config else {}
    values: dict[str, Any] = {
        "model": copy.deepcopy(foreign.model),
        "precision": {"dtype": "fp32" if foreign.dtype == torch.float32 else "bf16"},
        "vocab": _vocab(architecture, foreign, options, wanted.get("vocab", {})),
    }
    moe = values["model"]["moe"]
    moe |= architecture.own_groups(foreign) or {}
    if mode == "upcycle":
        moe["norm_topk_prob"] = True
    _merge(values, wanted)
    if "groups" not in moe:
        further = [entry.get("name") for entry in values["vocab"].get("further_modalities", [])]
        names = (*(modality.name.lower() for modality in Modality), *further)
        moe["groups"] = default_groups(mode, foreign, names, options.usage is not None)
    config = build_config(options.config or str(source.directory), values, options.overrides)
    _check_same_as_source(source, architecture, foreign, config)
    if config.vocab.codec_layout.uses_side_codes and not config.model.codebook_loss_weights:
        num_codebooks = config.vocab.num_codebooks
        # A frame then counts the mean of its codebooks, however many there are.
        config.model.codebook_loss_weights = [round(1 / num_codebooks, 4)] * num_codebooks
    return config


def _check_same_as_source(
    source: HuggingFaceModel, architecture: Architecture, foreign: ForeignModel, config: RunConfig
) -> None:
    """Raise :class:`ConfigError` if the user's file or overrides change what the source's weights compute."""
    difference = architecture.difference(foreign, config)
    if difference:
        name, theirs, ours = difference
        raise ConfigError(f"{name}={ours!r}: {source.directory} has {theirs!r}")
    if architecture.has_expert_bias and config.model.moe.moe_router_bias_update_rate == 0:
        raise ConfigError(
            f"model.moe.moe_router_bias_update_rate=0: must be above 0: {source.directory} has expert biases"
        )
    own = architecture.own_groups(foreign)
    if own is not None:
        groups = [group["experts"] for group in own["groups"]]
        if [group.experts for group in config.model.moe.groups] != groups:
            raise ConfigError(f"model.moe.groups: {source.directory} has its own, {groups}")


def _vocab(architecture: Architecture, foreign: ForeignModel, options: ImportOptions, wanted: Any) -> dict[str, Any]:
    """The defaults of the ``vocab`` section; ``wanted`` is that section of the user's file."""
    default, audio_vocab = architecture.default_vocab(foreign), options.audio_vocab
    check_shape(wanted, VocabLayout, "vocab", str(options.config))
    if audio_vocab is not None:
        try:
            layout, _, sizes = audio_vocab.partition(":")
            num_codebooks, codebook_size = map(int, sizes.split("x"))
        except ValueError:
            raise ConfigError(
                f"--audio-vocab={audio_vocab}: must be LAYOUT:CODEBOOKSxSIZE, for example frame:4x4032"
            ) from None
        if wanted and {"layout", "num_codebooks", "codebook_size"} & wanted.keys():
            raise ConfigError(f"--audio-vocab={audio_vocab}: the --config file has a vocab section, too; use only one")
        audio = {"layout": layout, "num_codebooks": num_codebooks, "codebook_size": codebook_size}
    elif wanted or "layout" in default:
        audio = {}
    else:
        raise ConfigError("--audio-vocab: is required, unless the --config file has a vocab section")
    return {**default, **audio}


def _merge(values: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Replace entries of ``values`` by those of ``wanted``, section by section."""
    for key, value in wanted.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value
