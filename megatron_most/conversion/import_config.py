"""What an import makes: the run configuration, from the source's shape and the user's wishes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_most.checkpointing.metadata import first_difference
from megatron_most.config import RunConfig
from megatron_most.config.load import build_config, check_shape
from megatron_most.conversion import hf_format
from megatron_most.conversion.architectures import Architecture, ForeignModel
from megatron_most.conversion.experts import default_groups, most_groups
from megatron_most.conversion.hugging_face import HuggingFaceModel
from megatron_most.errors import ConfigError
from megatron_most.vocab import Modality, VocabLayout

MOST_TEXT_IDS = 100002
MOST_AUDIO_UNITS = 500
"""Of the published MoST checkpoints: text ids, then one id for each unit, begin and end of audio."""


@dataclass(frozen=True)
class ImportOptions:
    """What the user asks for.

    Args:
        experts: ``partition``, ``expand`` or ``upcycle``; None for a model that has expert groups already.
        audio_vocab: ``layout:codebooksxsize``, as ``frame:4x4032``.
        config: YAML file with sections of a run configuration.
        overrides: ``section.key=value``.
        usage: JSON file with how often experts are used.
        noise: standard deviation of the noise on copied experts, as a share (0 to 1) of the weights' root mean square.
        seed: of new weights and noise.
        allow_pickle: read ``pytorch_model.bin``.
    """

    experts: str | None = None
    audio_vocab: str | None = None
    config: str | None = None
    overrides: Sequence[str] = ()
    usage: str | None = None
    noise: float = 0.0
    seed: int = 1234
    allow_pickle: bool = False


def import_mode(architecture: Architecture, has_extension: bool, options: ImportOptions) -> str:
    valid = {"deepseek-v2": ("partition", "expand"), "llama": ("upcycle",)}.get(architecture.name, ())
    if has_extension:
        if options.config is not None or options.audio_vocab is not None:
            raise ConfigError("--config, --audio-vocab: the extension beside the model says what it is; give --experts"
                              " to take the model without it")  # fmt: skip
        return "extension"
    if architecture.name == hf_format.NAME and (options.config is not None or options.audio_vocab is not None):
        raise ConfigError("--config, --audio-vocab: config.json says what the model is, in its run_config")
    if options.experts is None:
        if valid:
            raise ConfigError(f"--experts: a {architecture.name} model needs one of {', '.join(valid)}")
        return "as they are"
    if options.experts not in valid:
        rule = f"must be {' or '.join(valid)}" if valid else "leave it out, the model has its groups"
        raise ConfigError(f"--experts={options.experts}: for a {architecture.name} model {rule}")
    return options.experts


def import_config(
    source: HuggingFaceModel, architecture: Architecture, foreign: ForeignModel, mode: str, options: ImportOptions
) -> RunConfig:
    wanted = _read_yaml(options.config) if options.config else {}
    values: dict[str, Any] = {
        "model": copy.deepcopy(foreign.model),
        "precision": {"dtype": foreign.precision},
        "vocab": _vocab(architecture, foreign, options, wanted.get("vocab", {})),
    }
    moe = values["model"]["moe"]
    if architecture.name == "most":
        moe |= most_groups(foreign)
    if mode == "upcycle":
        moe["norm_topk_prob"] = True
    _merge(values, wanted)
    if "groups" not in moe:
        further = [entry.get("name") for entry in values["vocab"].get("further_modalities", [])]
        names = (*(modality.name.lower() for modality in Modality), *further)
        moe["groups"] = default_groups(mode, foreign, names, options.usage is not None)
    config = build_config(options.config or str(source.directory), values, options.overrides)
    fixed = {**foreign.model, "moe": {**foreign.model["moe"]}}
    for name in ("init_method_std", *(("first_k_dense_replace",) if mode == "upcycle" else ())):
        del fixed[name]
    if mode == "upcycle":
        del fixed["moe"]["moe_shared_expert_intermediate_size"]
    mine = asdict(config)["model"]
    difference = first_difference(fixed, _only(mine, fixed), "model")
    if difference:
        name, theirs, ours = difference
        raise ConfigError(f"{name}={ours!r}: {source.directory} has {theirs!r}")
    if architecture.name == "most":
        groups = [group["experts"] for group in most_groups(foreign)["groups"]]
        if [group.experts for group in config.model.moe.groups] != groups:
            raise ConfigError(f"model.moe.groups: {source.directory} has its own, {groups}")
    return config


def _vocab(architecture: Architecture, foreign: ForeignModel, options: ImportOptions, wanted: Any) -> dict[str, Any]:
    """The default of the ``vocab`` section; ``wanted`` is what the user's file has for it."""
    audio_vocab = options.audio_vocab
    check_shape(wanted, VocabLayout, "vocab", str(options.config))
    if audio_vocab is not None:
        try:
            layout, _, sizes = audio_vocab.partition(":")
            num_codebooks, codebook_size = map(int, sizes.split("x"))
        except ValueError:
            raise ConfigError(f"--audio-vocab={audio_vocab}: must be LAYOUT:CODEBOOKSxSIZE, as frame:4x4032") from None
        if wanted and {"layout", "num_codebooks", "codebook_size"} & wanted.keys():
            raise ConfigError("--audio-vocab: the --config file has a vocab section, too; give one of them")
        audio = {"layout": layout, "num_codebooks": num_codebooks, "codebook_size": codebook_size}
    elif architecture.name == "most":
        audio = {"layout": "flat", "num_codebooks": 1, "codebook_size": MOST_AUDIO_UNITS}
    elif wanted:
        audio = {}
    else:
        raise ConfigError("--audio-vocab: is needed, or a vocab section in the --config file")
    text = MOST_TEXT_IDS if architecture.name == "most" else foreign.vocab_size
    return {"text_vocab_size": text, **audio}


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise ConfigError(f"{path}: not readable as YAML: {reason}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a mapping of config sections")
    return values


def _merge(values: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Put ``wanted`` over ``values``, section by section."""
    for key, value in wanted.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


def _only(values: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """The entries of ``values`` that ``like`` has, too."""
    return {key: _only(values[key], entry) if isinstance(entry, dict) else values[key] for key, entry in like.items()}
