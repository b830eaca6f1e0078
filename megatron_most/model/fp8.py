"""Which layers of the model compute in FP8, and what goes on between steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_most import platform
from megatron_most.config import RunConfig
from megatron_most.moe.experts import ExpertPool, SequentialExperts
from megatron_most.precision import Fp8Product, as_fp8_linear, fp8_product
from megatron_most.precision.linear import FP8_CLASSES
from megatron_most.precision.scaling import AmaxHistory


def convert_to_fp8(config: RunConfig, chunks: Iterable[torch.nn.Module]) -> None:
    """Let the linear layers of the transformer and the experts compute in FP8, but for what stays in ``dtype``.

    That is the first and last layers, the pools of ``precision.bf16_expert_pools``, and everything outside the
    transformer layers or without a linear layer: routers, embeddings, heads.
    """
    precision, num_layers = config.precision, config.model.num_layers
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            if (
                not precision.num_layers_at_start_in_bf16
                < layer.layer_number
                <= num_layers - precision.num_layers_at_end_in_bf16
            ):
                continue
            for name, module in list(layer.named_modules()):
                if type(module) in FP8_CLASSES:
                    as_fp8_linear(module, fp8_product(config))
                elif isinstance(module, ExpertPool):
                    pool = name.rpartition(".")[2].removesuffix("_experts")
                    if pool not in precision.bf16_expert_pools:
                        module.fp8 = {key: fp8_product(config, len(module.experts)) for key in module.fp8}


def end_fp8_step(chunks: Iterable[torch.nn.Module]) -> None:
    """Move the histories of the recipe ``delayed`` on: the same on all ranks that hold parts or copies of a tensor.

    A collective call; does nothing for other recipes.
    """
    dense, expert = [], []
    for module, products in _products(chunks):
        histories = [product.history for product in products if product.history is not None]
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


def collect_fp8_padding(chunks: Iterable[torch.nn.Module]) -> tuple[float, float]:
    """How many of the experts' rows were padding since the last call, and how many there were, over all ranks.

    A collective call.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=platform.device())
    for _, products in _products(chunks):
        for product in products:
            sums += torch.tensor([product.padded_rows, product.rows], dtype=torch.float64, device=sums.device)
            product.rows = product.padded_rows = 0
    dist.all_reduce(sums)
    padded, rows = sums.tolist()
    return padded, rows


def fp8_state(chunks: Iterable[torch.nn.Module]) -> dict[str, ShardedTensor]:
    """The histories of the recipe ``delayed`` as tensors ``[steps, roles]`` of a checkpoint; none for other recipes.

    Each product of a layer has its own, and each expert in it by its logical number: any layout finds what it needs.
    """
    dense_copy = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True).rank()
    groups = (parallel_state.get_expert_tensor_parallel_group(), parallel_state.get_expert_data_parallel_group())
    expert_copy = tuple(group.rank() for group in groups)
    return {
        key: ShardedTensor.from_rank_offsets(
            key,
            history.oldest_first()[..., place].contiguous(),
            replica_id=expert_copy if is_expert else (dense_copy,),
        )
        for key, history, place, is_expert in _histories(chunks)
    }


def load_fp8_state(chunks: Iterable[torch.nn.Module], loaded: dict[str, torch.Tensor]) -> None:
    """Go on from tensors named as in :func:`fp8_state`."""
    pasts: dict[AmaxHistory, list[torch.Tensor]] = {}
    for key, history, _, _ in _histories(chunks):
        pasts.setdefault(history, []).append(loaded[key])
    for history, past in pasts.items():
        history.restore(torch.stack(past, dim=-1))


def _histories(chunks: Iterable[torch.nn.Module]) -> Iterator[tuple[str, AmaxHistory, int, bool]]:
    """(key, history, place in its last axis, whether it is an expert's), the places of a history in order."""
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            prefix = f"fp8.layers.{layer.layer_number - 1}"
            experts = getattr(layer.mlp, "experts", None)
            numbers = {}
            if isinstance(experts, SequentialExperts):
                first = parallel_state.get_expert_model_parallel_rank() * len(experts.local_experts)
                for index, expert in enumerate(experts.local_experts):
                    for name, module in expert.named_children():
                        numbers[module] = f"mlp.experts.{name}.{experts.groups.physical_to_logical[first + index]}"
            for path, module in layer.named_modules():
                fp8 = getattr(module, "fp8", None)
                if isinstance(fp8, Fp8Product) and fp8.history is not None:
                    yield f"{prefix}.{numbers.get(module, path)}", fp8.history, 0, module in numbers
                elif isinstance(module, ExpertPool):
                    for name, product in fp8.items():
                        if product is not None and product.history is not None:
                            for place, expert in enumerate(module.experts):
                                yield f"{prefix}.mlp.experts.{name}.{expert}", product.history, place, True


def _products(chunks: Iterable[torch.nn.Module]) -> Iterator[tuple[torch.nn.Module, list[Fp8Product]]]:
    for chunk in chunks:
        for module in chunk.modules():
            fp8 = getattr(module, "fp8", None)
            if isinstance(fp8, Fp8Product):
                yield module, [fp8]
            elif isinstance(module, ExpertPool):
                yield module, [product for product in fp8.values() if product is not None]


def _is_expert(module: torch.nn.Module) -> bool:
    return isinstance(module, ExpertPool) or getattr(module, "is_expert", False)
