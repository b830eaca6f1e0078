"""Compares transformers' implementation of a model with this project's on the same tokens, layer by layer.

Of each model, one layer is in memory at a time, and the hidden states of a few hundred tokens are carried along. So a
model of any size can be compared in the memory of its largest layer.

Shape letters: b rows, s positions, n = b * s tokens, h hidden size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_most.checkpointing.state import load_model_state
from megatron_most.config import RunConfig
from megatron_most.config.load import build_config
from megatron_most.conversion.architecture import ForeignModel
from megatron_most.conversion.architectures import BY_NAME, read_foreign
from megatron_most.conversion.comparison import Comparison, LogitComparison
from megatron_most.conversion.foreign_layers import ExpertSubset, ForeignLayers, blocks
from megatron_most.conversion.hugging_face import CONFIG, HuggingFaceModel
from megatron_most.conversion.native_layers import PORTABLE, NativeLayers
from megatron_most.conversion.weight_map import MAX_ELEMENTS, IdRun
from megatron_most.errors import CheckpointError, DataError, first_line
from megatron_most.files import parse_json
from megatron_most.model import MoSTModel, build_model
from megatron_most.parallel import on_rank_zero
from megatron_most.progress import Progress

_CHANGES = "this conversion changes the logits"


def check_logits(
    source: HuggingFaceModel,
    config: RunConfig,
    state: Path,
    tolerance: float | None,
    subset: ExpertSubset | None = None,
) -> dict[str, Any]:
    """Compare logits on random tokens. Returns the comparison as a dict, with a line ``said``. Collective.

    Args:
        state: folder of the sharded tensors of a native checkpoint.
        tolerance: largest allowed relative difference; None only reports it.
        subset: the experts of the base that text may choose, if not all. Then it is the base with these alone whose
            logits must be the same; the difference from the whole base is reported, too.

    Raises:
        CheckpointError: the difference is larger than ``tolerance``.
    """
    _, foreign = read_foreign(source.config, str(source.path_of(CONFIG)))
    tokens = random_tokens(config, foreign)
    if subset is None:
        [comparison] = _compare(source, foreign, config, state, tokens, [None])
        require_close(comparison, tolerance, str(source.directory))
        note = "" if tolerance is not None else f" ({_CHANGES})"
        return {"said": comparison.describe() + note, **dataclasses.asdict(comparison)}
    whole, of_subset = _compare(source, foreign, config, state, tokens, [None, subset])
    require_close(of_subset, tolerance, f"{source.directory}, with the experts of text alone")
    said = f"{of_subset.describe()}, against the base with the experts of text alone; {_CHANGES}: {whole.describe()}"
    return {"said": said, **dataclasses.asdict(whole), "experts_of_text_alone": dataclasses.asdict(of_subset)}


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

    Raises:
        DataError: a token is not one of the ids that both models have.
        CheckpointError: a tensor cannot be read, or is missing.
    """
    [comparison] = _compare(source, foreign, config, state, tokens, [None])
    return comparison


def _compare(
    source: HuggingFaceModel,
    foreign: ForeignModel,
    config: RunConfig,
    state: Path,
    tokens: torch.Tensor,
    subsets: Sequence[ExpertSubset | None],
) -> list[Comparison]:
    """:func:`compare` with the foreign model as it is (None), or with some of its experts alone.

    The ranks meet after every layer, so that none waits for longer than a layer takes.
    """
    started: list[_Models] = []
    on_rank_zero(lambda: started.append(_Models(source, foreign, config, state, tokens, subsets)))

    def run(layer: int) -> None:
        started[0].run(layer)

    num_layers = config.model.num_layers
    with Progress("verify", num_layers, " layers", enabled=dist.get_rank() == 0) as progress:
        for layer in range(num_layers):
            on_rank_zero(functools.partial(run, layer))
            progress.add(1)
    return on_rank_zero(lambda: started[0].compare_logits())


class _Models:
    """Foreign models and the native one after the layers that have been run."""

    def __init__(
        self,
        source: HuggingFaceModel,
        foreign: ForeignModel,
        config: RunConfig,
        state: Path,
        tokens: torch.Tensor,
        subsets: Sequence[ExpertSubset | None],
    ) -> None:
        self._tokens, self._runs = tokens, shared_ids(config, foreign)
        native_tokens = self._to_native(foreign.vocab_size)
        modality = config.vocab.modality_of(native_tokens)
        self._native = NativeLayers(config, state, native_tokens, modality)
        self._foreign = [ForeignLayers(source, foreign, tokens, modality, subset) for subset in subsets]
        self._models: list[NativeLayers | ForeignLayers] = [self._native, *self._foreign]
        self._hidden = self._normed = [model.embed() for model in self._models]
        self._layers: list[list[float]] = [[] for _ in subsets]

    def _to_native(self, vocab_size: int) -> torch.Tensor:
        """``[b, s]``: the native ids of the tokens."""
        to_native = torch.full((vocab_size,), -1)
        for run in self._runs:
            to_native[run.foreign : run.foreign + run.count] = torch.arange(run.native, run.native + run.count)
        tokens = self._tokens.flatten().tolist()
        unknown = [token for token in tokens if token >= vocab_size or to_native[token] < 0]
        if unknown:
            raise DataError(
                f"tokens: id {unknown[0]} is not one of the {int((to_native >= 0).sum())} ids that both models have"
            )
        return to_native[self._tokens]

    def run(self, layer: int) -> None:
        """Run a layer of each model, one after the other."""
        results = [model.run(layer, hidden) for model, hidden in zip(self._models, self._hidden, strict=True)]
        self._hidden, self._normed = ([result[place] for result in results] for place in (0, 1))
        mine, *theirs = self._hidden
        for found, hidden in zip(self._layers, theirs, strict=True):
            found.append(((hidden - mine).abs().max() / hidden.abs().max()).item())

    def compare_logits(self) -> list[Comparison]:
        """After the last layer: the logits of all shared ids, a block of them at a time."""
        mine, *theirs = (states.flatten(0, 1) for states in self._normed)
        found, at_once = [LogitComparison(self._tokens) for _ in theirs], max(1, MAX_ELEMENTS // mine.shape[1])
        for run in self._runs:
            for start, rows in blocks(run.foreign, run.count, at_once):
                logits = mine @ self._native.head(start + run.native - run.foreign, rows).T
                head = self._foreign[0].head(start, rows)
                for comparison, states in zip(found, theirs, strict=True):
                    comparison.add(start, states @ head.T, logits)
        return [logits.comparison(layers) for logits, layers in zip(found, self._layers, strict=True)]


def shared_ids(config: RunConfig, foreign: ForeignModel) -> tuple[IdRun, ...]:
    """The ids that both models have."""
    return BY_NAME[foreign.architecture].ids(config.vocab, foreign.vocab_size)


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
        rows = [parse_json(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
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
