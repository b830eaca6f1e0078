"""Compares transformers' implementation of a model with this project's on the same tokens, one after the other.

Shape letters: b rows, s positions, n = b * s tokens, h hidden size, V ids that both models have.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from megatron_most.checkpointing.state import load_model_state
from megatron_most.config import RunConfig
from megatron_most.config.load import build_config
from megatron_most.conversion import hf_format
from megatron_most.conversion.architectures import ForeignModel, read_foreign
from megatron_most.conversion.hugging_face import CONFIG, HuggingFaceModel
from megatron_most.conversion.import_plan import most_ids
from megatron_most.conversion.native import native_shapes
from megatron_most.conversion.weight_map import IdRun
from megatron_most.errors import CheckpointError, DataError, first_line
from megatron_most.model import MoSTModel, build_model

_SMALL = 1 << 27
"""Largest number of parameters with which import and export compare logits: 512 MB in fp32."""


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Logits ``[n, V]`` and the hidden states ``[n, h]`` after each layer, fp32."""

    logits: torch.Tensor
    hidden: list[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How two models differ on the same tokens.

    Args:
        max_difference, mean_difference: absolute differences of logits.
        largest_logit: largest absolute logit of the first model, to which differences are related.
        top1_agreement: fraction of positions with the same most likely id.
        perplexities: of the first and the second model on the tokens.
        layers: largest difference of hidden states after each layer, relative to the largest hidden state there.
        tokens: number of tokens compared.
    """

    max_difference: float
    mean_difference: float
    largest_logit: float
    top1_agreement: float
    perplexities: tuple[float, float]
    layers: list[float]
    tokens: int

    @property
    def relative_difference(self) -> float:
        return self.max_difference / self.largest_logit

    def first_difference(self, tolerance: float) -> int | None:
        """The first layer after which the models differ by more than ``tolerance``."""
        return next((layer for layer, value in enumerate(self.layers) if not value <= tolerance), None)

    def describe(self) -> str:
        first, second = self.perplexities
        return (
            f"logits of {self.tokens} tokens differ by at most {self.relative_difference:.1e} of the largest (mean"
            f" {self.mean_difference:.1e} absolute), same top-1 on {self.top1_agreement:.1%}, perplexity {first:.4f}"
            f" and {second:.4f}"
        )


def is_small(config: RunConfig) -> bool:
    return sum(math.prod(shape) for shape in native_shapes(config).values()) <= _SMALL


def check_logits(source: HuggingFaceModel, config: RunConfig, state: Path, tolerance: float | None) -> dict[str, Any]:
    """Compare logits on random tokens in this process. Returns the comparison as a dict, with a line ``said``.

    Args:
        state: folder of the sharded tensors of a native checkpoint.
        tolerance: largest allowed relative difference; None only reports it.

    Raises:
        CheckpointError: the difference is larger than ``tolerance``.
    """
    if importlib.util.find_spec("transformers") is None:
        return {"said": "not compared, transformers is not installed"}
    _, foreign = read_foreign(source.config, str(source.path_of(CONFIG)))
    comparison = compare(source, foreign, config, state, random_tokens(config, foreign))
    require_close(comparison, tolerance, str(source.directory))
    note = "" if tolerance is not None else " (this conversion changes the logits)"
    return {"said": comparison.describe() + note, **dataclasses.asdict(comparison)}


def require_close(comparison: Comparison, tolerance: float | None, what: str) -> None:
    """Raise :class:`CheckpointError` if the models differ by more than ``tolerance``; None allows any difference."""
    if tolerance is None or comparison.relative_difference <= tolerance:
        return
    layer = comparison.first_difference(tolerance)
    where = "in the head" if layer is None else f"from layer {layer} on"
    raise CheckpointError(
        f"{what}: the models differ {where}: {comparison.describe()}; the tolerance is {tolerance:.1e}"
    )


def compare(
    source: HuggingFaceModel, foreign: ForeignModel, config: RunConfig, state: Path, tokens: torch.Tensor
) -> Comparison:
    """Run both models, one after the other, on the foreign ids ``tokens [b, s]``."""
    runs = shared_ids(config, foreign)
    to_native = torch.full((foreign.vocab_size,), -1)
    for run in runs:
        to_native[run.foreign : run.foreign + run.count] = torch.arange(run.native, run.native + run.count)
    unknown = [token for token in tokens.flatten().tolist() if token >= foreign.vocab_size or to_native[token] < 0]
    if unknown:
        raise DataError(
            f"tokens: id {unknown[0]} is not one of the {int((to_native >= 0).sum())} ids that both models have"
        )
    foreign_ids = (to_native >= 0).nonzero().flatten()
    native_tokens = to_native[tokens]
    modality = config.vocab.modality_of(native_tokens)
    theirs = _foreign_outputs(source, foreign, tokens, modality, foreign_ids)
    mine = _native_outputs(config, state, native_tokens, modality, to_native[foreign_ids])
    place = torch.full((foreign.vocab_size,), -1)
    place[foreign_ids] = torch.arange(len(foreign_ids))
    return difference(theirs, mine, place[tokens])


def difference(first: Outputs, second: Outputs, tokens: torch.Tensor) -> Comparison:
    """Compare outputs. ``tokens [b, s]`` are columns of the logits."""
    gap = (first.logits - second.logits).abs()
    labels = tokens[:, 1:].flatten()
    perplexities = []
    for outputs in (first, second):
        logits = outputs.logits.view(*tokens.shape, -1)[:, :-1].flatten(0, 1)
        perplexities.append(torch.nn.functional.cross_entropy(logits, labels).exp().item())
    same = first.logits.argmax(dim=-1) == second.logits.argmax(dim=-1)
    return Comparison(
        max_difference=gap.max().item(),
        mean_difference=gap.mean().item(),
        largest_logit=first.logits.abs().max().item(),
        top1_agreement=same.float().mean().item(),
        perplexities=(perplexities[0], perplexities[1]),
        layers=[((a - b).abs().max() / a.abs().max()).item() for a, b in zip(first.hidden, second.hidden, strict=True)],
        tokens=tokens.numel(),
    )


def shared_ids(config: RunConfig, foreign: ForeignModel) -> tuple[IdRun, ...]:
    """The ids that both models have."""
    if foreign.choices:
        return most_ids(config.vocab, foreign.vocab_size)
    if foreign.has_audio_ids:
        return (IdRun(0, 0, config.vocab.size),)
    return (IdRun(0, 0, min(config.vocab.text_vocab_size, foreign.vocab_size)),)


def random_tokens(config: RunConfig, foreign: ForeignModel, rows: int = 4, length: int = 64) -> torch.Tensor:
    """``[rows, length]`` foreign ids that both models have; always the same ones."""
    runs = shared_ids(config, foreign)
    ids = torch.cat([torch.arange(run.foreign, run.foreign + run.count) for run in runs])
    length = min(length, config.data.seq_length)
    return ids[torch.randint(len(ids), (rows, length), generator=torch.Generator().manual_seed(0))]


def read_tokens(path: str | Path) -> torch.Tensor:
    """Token ids ``[b, s]`` from a file with one JSON list of ids per line, all of the same length.

    Raises:
        DataError: the file is unreadable, or does not hold such lists.
    """
    try:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON lines: {first_line(error)}") from None
    valid = rows and all(isinstance(row, list) and len(row) == len(rows[0]) > 1 for row in rows)
    if not valid or not all(type(token) is int and token >= 0 for row in rows for token in row):
        raise DataError(f"{path}: must hold one list of ids per line, all of the same length, at least 2")
    return torch.tensor(rows)


def _foreign_outputs(
    source: HuggingFaceModel,
    foreign: ForeignModel,
    tokens: torch.Tensor,
    modality: torch.Tensor,
    ids: torch.Tensor,
) -> Outputs:
    model = _transformers_model(source)
    if foreign.choices:
        _choose_by_modality(model, foreign, modality.flatten())
    return _run(model.eval(), model.model.layers, lambda: model(tokens).logits.flatten(0, 1)[:, ids])


def _transformers_model(source: HuggingFaceModel) -> Any:
    """The model of a folder in fp32; what code a folder brings along is not run."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if source.config["model_type"] == hf_format.MODEL_TYPE:
        from megatron_most.huggingface import MoSTForConditionalGeneration

        return MoSTForConditionalGeneration.from_pretrained(
            source.directory, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        )
    values = {key: value for key, value in source.config.items() if key not in ("model_type", "architectures")}
    kind = "Llama" if source.config["model_type"] == "llama" else "DeepseekV2"
    config = getattr(transformers, f"{kind}Config")(**values)
    model = getattr(transformers, f"{kind}ForCausalLM").from_pretrained(
        source.directory, config=config, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    # Frequencies are not weights: transformers leaves them unset if torch's tensor factories have stand-ins.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def _choose_by_modality(model: Any, foreign: ForeignModel, modality: torch.Tensor) -> None:
    """Replace DeepSeek-V2's routers by MoST's (arXiv 2601.10272): softmax over all experts, scores of the other group
    set to zero, top-k without normalization."""
    allowed = torch.zeros(len(foreign.choices), foreign.num_experts, dtype=torch.bool)
    for index, experts in enumerate(foreign.choices):
        allowed[index, list(experts)] = True

    def forward(gate: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = torch.nn.functional.linear(hidden.flatten(0, -2).float(), gate.weight.float())
        scores = logits.softmax(dim=-1).masked_fill(~allowed[modality], 0.0)
        weights, experts = scores.topk(foreign.top_k, dim=-1)
        return logits, weights * gate.routed_scaling_factor, experts

    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            gate = layer.mlp.gate
            gate.forward = lambda hidden, gate=gate: forward(gate, hidden)


def _native_outputs(
    config: RunConfig, state: Path, tokens: torch.Tensor, modality: torch.Tensor, ids: torch.Tensor
) -> Outputs:
    model = whole_model(config, state)
    is_padding = torch.zeros_like(tokens, dtype=torch.bool)
    codes = None
    if config.vocab.codec_layout.uses_side_codes:
        codes = torch.full((*tokens.shape, config.vocab.num_codebooks), -1)
    device = next(model.parameters()).device
    inputs = [None if x is None else x.to(device) for x in (tokens, modality, is_padding, codes)]
    return _run(
        model.eval(), model.decoder.layers, lambda: model(*inputs)[0].flatten(0, 1)[:, ids.to(device)], batch_axis=1
    )


def whole_model(config: RunConfig, state: Path) -> MoSTModel:
    """The whole model in this process, in fp32, with the weights of a checkpoint's ``state`` folder.

    Call :func:`megatron_most.parallel.initialize` for one process before.
    """
    values = dataclasses.asdict(config)
    moe = {"expert_backend": "sequential", "moe_token_dispatcher_type": "alltoall", "moe_shared_expert_overlap": False}
    values["model"]["moe"] |= moe
    values["model"]["transformer_impl"] = "portable"
    precision = {"precision": {"dtype": "fp32"}}
    sections = {name: values[name] for name in ("vocab", "model")}
    chunks = build_model(build_config(str(state.parent), {**sections, **precision}))
    load_model_state(state, chunks)
    return chunks[0]


@torch.inference_mode()
def _run(
    model: torch.nn.Module, layers: Iterable[torch.nn.Module], forward: Callable[[], torch.Tensor], batch_axis: int = 0
) -> Outputs:
    """Logits and the output of each layer, with tokens in the order ``[b, s]``."""
    hidden: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        hidden.append(states.transpose(0, batch_axis).flatten(0, 1).float().cpu())

    handles = [layer.register_forward_hook(keep) for layer in layers]
    logits = forward().float().cpu()
    for handle in handles:
        handle.remove()
    return Outputs(logits, hidden)
