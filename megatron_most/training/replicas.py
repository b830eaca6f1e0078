"""Compares the weights that several ranks hold copies of, so that no run trains on, or saves, weights that differ.

Dense weights have a copy on every data-parallel and context-parallel rank, and those that tensor parallelism does not
cut (norms, routers, down-projections of latent attention) on every tensor-parallel rank as well. Experts have copies in
their expert-data-parallel group.

Shape letters: w words of a tensor, T tensors of this rank, G ranks of a group.
"""

from __future__ import annotations

import re
import socket
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_most import platform
from megatron_most.errors import MostError
from megatron_most.model import MoSTModel
from megatron_most.parallel import fail
from megatron_most.training.parts import is_expert
from megatron_most.training.step_hooks import Checkpoints, StepHook
from megatron_most.training.train_step import StepResult, gather_weights

if TYPE_CHECKING:
    from megatron_most.training.trainer import Trainer

_MOST_KEYS = 1 << 20
"""16 MB of them."""

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
"""Integers with the bits of a value, by its size in bytes. They need fewer bits than the keys."""


class ReplicaCheck(StepHook):
    """Compares the copies before each save, and every ``training.check_weight_hash_across_dp_replicas_interval`` steps.

    Copies that differ end the run.
    """

    is_long = True

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        interval = trainer.config.training.check_weight_hash_across_dp_replicas_interval
        if self._checkpoints.is_due(trainer) or (interval and trainer.state.step % interval == 0):
            gather_weights(trainer.state)
            error = unequal_copies(trainer.state.model_chunks, trainer.state.step)
            if error is not None:
                self._checkpoints.finish()  # of an earlier step, whose copies were equal
                fail(error if dist.get_rank() == 0 else None)


class Difference(NamedTuple):
    """Copies of a tensor that differ: its name in a checkpoint, and each rank's hash."""

    tensor: str
    hashes: dict[int, int]

    def describe(self, hosts: list[str]) -> str:
        """Names the tensor and the ranks: those outvoted by a majority, or all if there is none."""
        [(common, votes), *_] = Counter(self.hashes.values()).most_common(1)
        ranks = sorted(self.hashes)
        if votes * 2 <= len(ranks):
            return f"{self.tensor} differs between {_named(ranks, hosts)}"
        odd = [rank for rank in ranks if self.hashes[rank] != common]
        return f"{self.tensor} on {_named(odd, hosts)} differs from the {votes} other copies"


def unequal_copies(model_chunks: list[MoSTModel], step: int) -> MostError | None:
    """Compare the copies of every weight through hashes. Collective.

    Returns:
        The same on every rank: an error that names the first tensor whose copies differ, or None.
    """
    if dist.get_world_size() == 1:
        return None
    found: list[tuple[str, list[Difference]]] = [("", [])] * dist.get_world_size()
    dist.all_gather_object(found, (socket.gethostname(), list(_differences(model_chunks))))
    hosts = [host for host, _ in found]
    differences = [difference for _, of_rank in found for difference in of_rank]
    if not differences:
        return None
    more = f" (and {len(differences) - 1} more tensors differ)" if len(differences) > 1 else ""
    return MostError(
        f"step {step}: {differences[0].describe(hosts)}{more}: copies of a weight must be equal; nothing of this step"
        " was saved: repeat the command to go on from the newest checkpoint, without that machine if it happens again"
    )


def _differences(model_chunks: list[MoSTModel]) -> Iterator[Difference]:
    """The differences in this rank's groups; of each group, the first rank reports them. Collective."""
    for group, tensors in _copied_tensors(model_chunks):
        if not tensors or group.size() == 1:
            continue
        keys = _hash_keys(max(tensor.nbytes for tensor in tensors.values()))
        mine = torch.stack([weight_hash(tensor, keys) for tensor in tensors.values()])
        of_ranks = mine.new_empty(group.size(), len(mine))
        dist.all_gather(list(of_ranks.unbind()), mine, group=group)
        if group.rank() == 0:
            ranks = dist.get_process_group_ranks(group)
            for name, hashes in zip(tensors, of_ranks.T.tolist(), strict=True):
                if len(set(hashes)) > 1:
                    yield Difference(name, dict(zip(ranks, hashes, strict=True)))


def _copied_tensors(model_chunks: list[MoSTModel]) -> list[tuple[dist.ProcessGroup, dict[str, torch.Tensor]]]:
    """The ranks that hold copies, and those weights and saved buffers of this rank that they hold copies of."""
    uncut: dict[str, torch.Tensor] = {}
    cut: dict[str, torch.Tensor] = {}
    experts: dict[str, torch.Tensor] = {}
    for name, tensor in _saved_tensors(model_chunks):
        # Transformer Engine marks all its weights as cut. A weight whose gradients are summed over the ranks is not.
        is_summed = getattr(tensor, "sequence_parallel", False)
        is_cut = getattr(tensor, "tensor_model_parallel", False) and not is_summed
        (experts if is_expert(name) else cut if is_cut else uncut)[name] = tensor
    return [
        (parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True), uncut),
        (parallel_state.get_data_parallel_group(with_context_parallel=True), cut),
        (parallel_state.get_expert_data_parallel_group(), experts),
    ]


def _saved_tensors(model_chunks: Iterable[MoSTModel]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of each weight and saved buffer. Layers are numbered through the whole model."""
    for chunk in model_chunks:

        def in_model(match: re.Match, chunk: MoSTModel = chunk) -> str:
            return f"decoder.layers.{chunk.decoder.layers[int(match[1])].layer_number - 1}."

        for name, value in chunk.state_dict(keep_vars=True).items():
            if isinstance(value, torch.Tensor) and not name.endswith("_extra_state"):
                yield re.sub(r"^decoder\.layers\.(\d+)\.", in_model, name), value


def weight_hash(tensor: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """An int64 hash of the bits of ``tensor [w]``, computed on its device.

    It is ``MULTILINEAR`` of Lemire and Kaser, "Strongly universal string hashing is fast" (arXiv 1202.4961): each word
    times a random 64-bit key, added up modulo 2^64. The keys are odd, so that a change of one word, such as a flipped
    bit, always changes the hash. Other changes are missed with a probability of about 2^-32.

    Args:
        keys: ``[2, n]`` int64, odd: one row for the words of a block of n, one for the hashes of the blocks.
    """
    of_words, of_blocks = keys
    words = tensor.detach().reshape(-1).view(_WORDS[tensor.element_size()])
    hashes = torch.stack([(block * of_words[: len(block)]).sum() for block in words.split(len(of_words))])
    return (hashes * of_blocks[: len(hashes)]).sum()


def _hash_keys(num_bytes: int) -> torch.Tensor:
    """Random odd keys for tensors of up to ``num_bytes``, the same on every rank of a group.

    They do not affect the random states of training.
    """
    generator = torch.Generator().manual_seed(0)
    limits = torch.iinfo(torch.int64)
    keys = torch.randint(limits.min, limits.max, (2, min(_MOST_KEYS, max(num_bytes, 1))), generator=generator)
    return (keys | 1).to(platform.device())


def _named(ranks: list[int], hosts: list[str]) -> str:
    """``rank 3 (node7)``, ``ranks 0 (node1) and 1 (node1)``."""
    named = [f"{rank} ({hosts[rank]})" for rank in ranks]
    return f"rank {named[0]}" if len(named) == 1 else f"ranks {', '.join(named[:-1])} and {named[-1]}"
