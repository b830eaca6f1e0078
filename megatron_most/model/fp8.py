"""Which layers of the model compute in FP8, and the state that they keep between steps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_most import platform
from megatron_most.config import RunConfig
from megatron_most.model.most_model import MoSTModel
from megatron_most.moe.experts import ExpertPool, SequentialExperts
from megatron_most.precision import Fp8Product, as_fp8_linear, fp8_product
from megatron_most.precision.linear import FP8_CLASSES
from megatron_most.precision.scaling import AmaxHistory

_SEQUENTIAL_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(\w+)")
"""Path of a linear layer of :class:`SequentialExperts` in its transformer layer: local expert, projection."""


def convert_to_fp8(config: RunConfig, chunks: Iterable[MoSTModel]) -> None:
    """Make the linear layers and experts of the transformer layers compute in FP8.

    The first and last layers and the pools of ``precision.bf16_expert_pools`` stay in ``precision.dtype``, and so does
    everything that is not a linear layer or expert of a transformer layer: routers, embeddings, heads.
    """
    precision = config.precision
    first = precision.num_layers_at_start_in_bf16 + 1
    last = config.model.num_layers - precision.num_layers_at_end_in_bf16
    for layer in _layers(chunks):
        if not first <= layer.layer_number <= last:
            continue
        for name, module in list(layer.named_modules()):
            if type(module) in FP8_CLASSES:
                as_fp8_linear(module, fp8_product(config))
            elif isinstance(module, ExpertPool):
                pool = name.rpartition(".")[2].removesuffix("_experts")
                if pool not in precision.bf16_expert_pools:
                    module.fp8 = {key: fp8_product(config, len(module.experts)) for key in module.fp8}


def end_fp8_step(chunks: Iterable[MoSTModel]) -> None:
    """End a step of the recipe ``delayed``: reduce its largest magnitudes over ranks and add them to the histories.

    All ranks that hold shards or copies of a tensor get the same history. Collective; does nothing for other recipes.
    """
    dense: list[AmaxHistory] = []
    expert: list[AmaxHistory] = []
    for _, module, products in _fp8_modules(chunks):
        histories = [product.history for product in products.values() if product.history is not None]
        (expert if _is_expert(module) else dense).extend(histories)
    everyone = (parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),)
    copies = (parallel_state.get_expert_data_parallel_group(), parallel_state.get_expert_tensor_parallel_group())
    for histories, groups in ((dense, everyone), (expert, copies)):
        if not histories:
            continue
        largest = torch.cat([history.current for history in histories], dim=1)
        for group in groups:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        sizes = [history.current.shape[1] for history in histories]
        for history, mine in zip(histories, largest.split(sizes, dim=1), strict=True):
            history.advance(mine)


def discard_fp8_step(chunks: Iterable[MoSTModel]) -> None:
    """Leave the histories of the recipe ``delayed`` as they were before the step."""
    for _, _, products in _fp8_modules(chunks):
        for product in products.values():
            if product.history is not None:
                product.history.current.zero_()


def collect_fp8_padding(chunks: Iterable[MoSTModel]) -> tuple[float, float]:
    """Rows of FP8 experts that were padding since the last call, and all their rows, over all ranks. Collective."""
    sums = torch.zeros(2, dtype=torch.float64, device=platform.device())
    for _, _, products in _fp8_modules(chunks):
        for product in products.values():
            sums += torch.tensor([product.padded_rows, product.rows], dtype=torch.float64, device=sums.device)
            product.rows = product.padded_rows = 0
    dist.all_reduce(sums)
    padded, rows = sums.tolist()
    return padded, rows


def fp8_state(chunks: Iterable[MoSTModel]) -> dict[str, ShardedTensor]:
    """The histories of the recipe ``delayed`` as checkpoint tensors ``[steps, roles]``; none for other recipes.

    Every product of a layer has its own tensor, and so does every expert, by its logical index. They therefore load
    into any layout.
    """
    dense_copy = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True).rank()
    groups = (parallel_state.get_expert_tensor_parallel_group(), parallel_state.get_expert_data_parallel_group())
    expert_copy = tuple(group.rank() for group in groups)
    return {
        entry.key: ShardedTensor.from_rank_offsets(
            entry.key,
            entry.history.oldest_first()[..., entry.place].contiguous(),
            replica_id=expert_copy if entry.is_expert else (dense_copy,),
        )
        for entry in _history_entries(chunks)
    }


def load_fp8_state(chunks: Iterable[MoSTModel], loaded: dict[str, torch.Tensor]) -> None:
    """Restore the histories from tensors keyed as in :func:`fp8_state`."""
    pasts: dict[AmaxHistory, list[torch.Tensor]] = {}
    for entry in _history_entries(chunks):
        pasts.setdefault(entry.history, []).append(loaded[entry.key])
    for history, past in pasts.items():
        history.restore(torch.stack(past, dim=-1))


class _HistoryEntry(NamedTuple):
    """One checkpoint tensor: row ``place`` of the last axis of ``history``, under ``key``."""

    key: str
    history: AmaxHistory
    place: int
    is_expert: bool


def _history_entries(chunks: Iterable[MoSTModel]) -> Iterator[_HistoryEntry]:
    """The entries of all histories; those of one history follow each other, in the order of their places."""
    for path, module, products in _fp8_modules(chunks):
        for name, product in products.items():
            if product.history is None:
                continue
            if isinstance(module, ExpertPool):
                layer = path.partition(".mlp.")[0]
                for place, expert in enumerate(module.experts):
                    yield _HistoryEntry(f"fp8.{layer}.mlp.experts.{name}.{expert}", product.history, place, True)
            else:
                yield _HistoryEntry(f"fp8.{path}", product.history, 0, _is_expert(module))


def _fp8_modules(chunks: Iterable[MoSTModel]) -> Iterator[tuple[str, torch.nn.Module, dict[str, Fp8Product]]]:
    """(path, module, products) of the modules that compute in FP8.

    The path is ``layers.<index in the model>.<path in the layer>``; a sequential expert's ends in
    ``mlp.experts.<projection>.<logical index>``. A pool has a product for each projection, a linear layer one: ``""``.
    """
    for layer in _layers(chunks):
        for path, module in layer.named_modules():
            fp8 = getattr(module, "fp8", None)
            if isinstance(fp8, Fp8Product):
                yield f"layers.{layer.layer_number - 1}.{_logical_path(layer, path)}", module, {"": fp8}
            elif isinstance(module, ExpertPool):
                products = {name: product for name, product in module.fp8.items() if product is not None}
                yield f"layers.{layer.layer_number - 1}.{path}", module, products


def _logical_path(layer: TransformerLayer, path: str) -> str:
    """``path``, with the logical index of a sequential expert instead of its place on this rank."""
    match = _SEQUENTIAL_EXPERT.fullmatch(path)
    if match is None:
        return path
    experts = layer.mlp.experts
    assert isinstance(experts, SequentialExperts)
    first = parallel_state.get_expert_model_parallel_rank() * len(experts.local_experts)
    return f"mlp.experts.{match[2]}.{experts.groups.physical_to_logical[first + int(match[1])]}"


def _layers(chunks: Iterable[MoSTModel]) -> Iterator[TransformerLayer]:
    for chunk in chunks:
        yield from chunk.decoder.layers


def _is_expert(module: torch.nn.Module) -> bool:
    return isinstance(module, ExpertPool) or getattr(module, "is_expert", False)
