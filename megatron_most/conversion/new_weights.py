"""Weights without a counterpart in the base model: audio ids, codebooks, routers of an upcycled model.

Embeddings are drawn from a normal distribution fitted per dimension to the base's own rows, so a new id has the scale
of a text id. So has the sum of a frame's C codebook embeddings; its mean comes from the id that they are added to.

Output rows are not drawn: independent rows of the base's scale, multiplied by a trained base's large hidden states,
give confident and wrong predictions. Codebook heads start at zero, which makes all codes equally likely. A new row of
the text head starts as the mean of the base's rows: its logit is the mean text logit, so by Jensen's inequality it is
at most as likely as the average text id, and n new rows take at most n / (V + n) of the probability. Gradients differ
by label, so equal rows do not stay equal. Padding rows are new rows like any other.

Shape letters: h hidden size, C codebooks, V text ids.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_most.checkpointing.regions import Region
from megatron_most.config import RunConfig
from megatron_most.conversion.native import CODEBOOK_EMBEDDING, CODEBOOK_HEAD, EMBEDDING, EXPERT_BIAS, HEAD, ROUTER

_SAMPLED_ROWS = 4096


@dataclass(frozen=True)
class RowDistribution:
    """Mean and standard deviation ``[h]`` of the rows of a matrix."""

    mean: torch.Tensor
    std: torch.Tensor

    @classmethod
    def of(cls, rows: Callable[[int, int], torch.Tensor], count: int) -> RowDistribution:
        """Fit to at most 4096 of ``count`` rows, in 16 evenly spaced blocks; ``rows(start, n)`` reads a block."""
        if count <= _SAMPLED_ROWS:
            sample = rows(0, count)
        else:
            length = _SAMPLED_ROWS // 16
            starts = [place * (count - length) // 15 for place in range(16)]
            sample = torch.cat([rows(start, length) for start in starts])
        sample = sample.float()
        return cls(sample.mean(dim=0), sample.std(dim=0, unbiased=False))


class NewWeights:
    """Makes the weights of regions. They depend only on the seed, not on the rank or the order.

    Args:
        embedding: of the base's text ids.
        head: ``[h]``, the mean of the text head's rows.
    """

    def __init__(self, config: RunConfig, seed: int, embedding: RowDistribution, head: torch.Tensor) -> None:
        self._seed = seed
        num = config.vocab.num_codebooks
        zero = torch.zeros_like(embedding.mean)
        router = RowDistribution(zero, torch.full_like(zero, config.model.init_method_std))
        self._distributions: dict[str, RowDistribution | None] = {  # None: zeros
            # A row that is both starts as heads do.
            EMBEDDING: RowDistribution(head, zero) if config.model.share_embeddings_and_output_weights else embedding,
            HEAD: RowDistribution(head, zero),
            CODEBOOK_EMBEDDING: RowDistribution(zero, embedding.std / math.sqrt(num)),
            CODEBOOK_HEAD: None,
            ROUTER: router,
            EXPERT_BIAS: None,
        }

    def covers(self, region: Region) -> bool:
        """Whether the weights of a region may be new."""
        return _kind(region.key) in self._distributions

    def draw(self, region: Region, dtype: torch.dtype) -> torch.Tensor:
        distribution = self._distributions[_kind(region.key)]
        if distribution is None:
            return torch.zeros(region.sizes, dtype=dtype)
        # In place: most of the time of a large region is spent on the first access to new memory.
        noise = torch.randn(region.sizes, generator=generator(self._seed, region))
        return noise.mul_(distribution.std).add_(distribution.mean).to(dtype)


def generator(seed: int, region: Region) -> torch.Generator:
    """The random generator of one region."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {region.key} {region.offsets}".encode()))


def _kind(key: str) -> str:
    """The pattern of a key: ``decoder.layers.3.mlp`` -> ``decoder.layers.{layer}.mlp``."""
    for pattern in (ROUTER, EXPERT_BIAS, CODEBOOK_EMBEDDING, CODEBOOK_HEAD):
        before, _, after = pattern.replace("{layer}", "{}").replace("{codebook}", "{}").partition("{}")
        if re.fullmatch(re.escape(before) + r"\d+" + re.escape(after), key):
            return pattern
    return key
