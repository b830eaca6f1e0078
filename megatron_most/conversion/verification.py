"""Compares transformers' implementation of a model with this project's on the same tokens, layer by layer.

Of each model, one layer is in memory at a time, and the hidden states of a few hundred tokens are carried along. So a
model of any size can be compared in the memory of its largest layer.

Shape letters: b rows, s positions, n = b * s tokens, h hidden size, V ids that both models have, k of them in a block.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_most.checkpointing.state import load_model_state
from megatron_most.config import RunConfig
from megatron_most.config.load import build_config
from megatron_most.conversion.architectures import ForeignModel, read_foreign
from megatron_most.conversion.foreign_layers import ForeignLayers, blocks
from megatron_most.conversion.hugging_face import CONFIG, HuggingFaceModel
from megatron_most.conversion.import_plan import most_ids
from megatron_most.conversion.native_layers import PORTABLE, NativeLayers
from megatron_most.conversion.weight_map import MAX_ELEMENTS, IdRun
from megatron_most.errors import CheckpointError, DataError, first_line
from megatron_most.model import MoSTModel, build_model
from megatron_most.parallel import on_rank_zero
from megatron_most.progress import Progress


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


def check_logits(source: HuggingFaceModel, config: RunConfig, state: Path, tolerance: float | None) -> dict[str, Any]:
    """Compare logits on random tokens. Returns the comparison as a dict, with a line ``said``. Collective.

    Args:
        state: folder of the sharded tensors of a native checkpoint.
        tolerance: largest allowed relative difference; None only reports it.

    Raises:
        CheckpointError: the difference is larger than ``tolerance``.
    """
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
    """Run both models, layer by layer, on the foreign ids ``tokens [b, s]``. Collective: rank 0 does the work.

    The ranks meet after every layer, so that none waits for longer than a layer takes.

    Raises:
        DataError: a token is not one of the ids that both models have.
        CheckpointError: a tensor cannot be read, or is missing.
    """
    started: list[_BothModels] = []
    on_rank_zero(lambda: started.append(_BothModels(source, foreign, config, state, tokens)))

    def run(layer: int) -> None:
        started[0].run(layer)

    num_layers = config.model.num_layers
    with Progress("verify", num_layers, "layers", enabled=dist.get_rank() == 0) as progress:
        for layer in range(num_layers):
            on_rank_zero(functools.partial(run, layer))
            progress.add(1)
    return on_rank_zero(lambda: started[0].compare_logits())


class _BothModels:
    """Both models after the layers that have been run."""

    def __init__(
        self, source: HuggingFaceModel, foreign: ForeignModel, config: RunConfig, state: Path, tokens: torch.Tensor
    ) -> None:
        self._runs = shared_ids(config, foreign)
        to_native = torch.full((foreign.vocab_size,), -1)
        for run in self._runs:
            to_native[run.foreign : run.foreign + run.count] = torch.arange(run.native, run.native + run.count)
        unknown = [token for token in tokens.flatten().tolist() if token >= foreign.vocab_size or to_native[token] < 0]
        if unknown:
            raise DataError(
                f"tokens: id {unknown[0]} is not one of the {int((to_native >= 0).sum())} ids that both models have"
            )
        native_tokens = to_native[tokens]
        modality = config.vocab.modality_of(native_tokens)
        self._tokens = tokens
        self._models = (
            ForeignLayers(source, foreign, tokens, modality),
            NativeLayers(config, state, native_tokens, modality),
        )
        self._hidden = [model.embed() for model in self._models]
        self._normed = self._hidden
        self._layers: list[float] = []

    def run(self, layer: int) -> None:
        """Run a layer of each model, one after the other."""
        results = [model.run(layer, hidden) for model, hidden in zip(self._models, self._hidden, strict=True)]
        self._hidden, self._normed = ([result[place] for result in results] for place in (0, 1))
        first, second = self._hidden
        self._layers.append(((first - second).abs().max() / first.abs().max()).item())

    def compare_logits(self) -> Comparison:
        """After the last layer: the logits of all shared ids, a block of them at a time."""
        hidden = [states.flatten(0, 1) for states in self._normed]
        logits, at_once = _Logits(self._tokens), max(1, MAX_ELEMENTS // hidden[0].shape[1])
        for run in self._runs:
            for start, rows in blocks(run.foreign, run.count, at_once):
                heads = (
                    self._models[0].head(start, rows),
                    self._models[1].head(start + run.native - run.foreign, rows),
                )
                logits.add(start, *(states @ head.T for states, head in zip(hidden, heads, strict=True)))
        return logits.comparison(self._layers)


class _Logits:
    """What is said of the logits of two models, collected from blocks of them.

    Args:
        tokens: ``[b, s]``, foreign ids.
    """

    def __init__(self, tokens: torch.Tensor) -> None:
        self._tokens = tokens
        n = tokens.numel()
        self._labels = tokens.roll(-1, dims=1).flatten()  # the last one of each row is left out later
        self._gap = self._total = self._largest = torch.zeros(())
        self._count = 0
        self._best = [(torch.full((n,), -torch.inf), torch.full((n,), -1)) for _ in range(2)]
        self._normalizers = [torch.full((n,), -torch.inf) for _ in range(2)]
        self._of_labels = [torch.zeros(n) for _ in range(2)]

    def add(self, start: int, first: torch.Tensor, second: torch.Tensor) -> None:
        """Logits ``[n, k]`` of both models for the ``k`` foreign ids from ``start``."""
        gap = (first - second).abs()
        # torch's maximum keeps NaN, Python's does not.
        self._gap, self._total = torch.maximum(self._gap, gap.max()), self._total + gap.double().sum()
        self._largest = torch.maximum(self._largest, first.abs().max())
        self._count += gap.numel()
        here = ((self._labels >= start) & (self._labels < start + first.shape[1])).nonzero().flatten()
        for model, logits in enumerate((first, second)):
            values, places = logits.max(dim=1)
            best, ids = self._best[model]
            is_better = values > best
            self._best[model] = (values.where(is_better, best), (places + start).where(is_better, ids))
            self._normalizers[model] = torch.logaddexp(self._normalizers[model], logits.logsumexp(dim=1))
            self._of_labels[model][here] = logits[here, self._labels[here] - start]

    def comparison(self, layers: list[float]) -> Comparison:
        losses = [
            (normalizer - of_label).view(self._tokens.shape)[:, :-1].mean()
            for normalizer, of_label in zip(self._normalizers, self._of_labels, strict=True)
        ]
        first, second = (loss.exp().item() for loss in losses)
        (_, ids), (_, others) = self._best
        return Comparison(
            max_difference=self._gap.item(),
            mean_difference=self._total.item() / self._count,
            largest_logit=self._largest.item(),
            top1_agreement=(ids == others).float().mean().item(),
            perplexities=(first, second),
            layers=layers,
            tokens=self._tokens.numel(),
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


def whole_model(config: RunConfig, state: Path) -> MoSTModel:
    """The whole model in this process, in fp32, with the weights of a checkpoint's ``state`` folder.

    Call :func:`megatron_most.parallel.initialize` for one process before.
    """
    values = dataclasses.asdict(config)
    values["model"]["moe"] |= PORTABLE
    values["model"]["transformer_impl"] = "portable"
    precision = {"precision": {"dtype": "fp32"}}
    sections = {name: values[name] for name in ("vocab", "model")}
    chunks = build_model(build_config(str(state.parent), {**sections, **precision}))
    load_model_state(state, chunks)
    return chunks[0]
