"""Rotary position embeddings, computed once for all layers, queries, and keys.

The numbers of a head form pairs; position p rotates pair i by p times the pair's frequency, which is one product of
complex numbers. In the output the two numbers of a pair are neighbors, even if they were not in the input: queries and
keys have the same order, so logits do not depend on it.

Shape letters: d head size (a head has d / 2 frequencies, in radians per position, from high to low); s positions of
this rank; b rows; n heads.
"""

from __future__ import annotations

import math

import torch
from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding

from megatron_most.config.attention import AttentionConfig, RopeConfig
from megatron_most.model.key_value_cache import KeyValueCache
from megatron_most.model.packed_row import PackedRow
from megatron_most.parallel import zigzag_positions

_LLAMA3_ROTATIONS = (1.0, 4.0)
"""Rotations over the original length below which a frequency is divided by the whole factor, and above which kept."""


class Rotations:
    """A table of ``cos + i sin`` of every position's angles, by which pairs of query and key numbers are multiplied.

    It is not a buffer: casting the model to bf16 would round it.
    """

    def __init__(
        self, attention: AttentionConfig, num_positions: int, cp_group: torch.distributed.ProcessGroup
    ) -> None:
        """Build the table for ``num_positions``; a longer row extends it."""
        self.cp_group = cp_group
        self.embedding = _embedding(attention, cp_group)
        # Multi-latent attention does not rotate the first numbers of a head.
        self.num_unrotated = attention.qk_head_dim if attention.type == "mla" else 0
        self.table = self._up_to(num_positions)

    def __call__(
        self, num_positions: int, packed: PackedRow | None = None, cache: KeyValueCache | None = None
    ) -> torch.Tensor:
        """Rotations ``[s, 1, 1, d / 2]``, complex, of this rank's s = ``num_positions`` positions of a row.

        Positions restart in each document of a ``packed`` row. While decoding, the position is that of the ``cache``.
        """
        size = self.cp_group.size()
        last = num_positions * size
        needed = last if cache is None else cache.max_sequence_length
        if needed > len(self.table):
            self.table = self._up_to(needed)
        if cache is not None and cache.position is not None:
            return self.table.index_select(0, cache.position)
        if packed is not None:
            return self.table[packed.document_positions]
        if size > 1:
            return self.table[zigzag_positions(last, self.cp_group.rank(), size, self.table.device)]
        return self.table[:last]

    @torch.no_grad()
    def _up_to(self, num_positions: int) -> torch.Tensor:
        angles = self.embedding.get_emb(num_positions)
        angles, scale = angles if isinstance(angles, tuple) else (angles, 1.0)
        angles = angles[..., : angles.shape[-1] // 2]  # the second half repeats the first
        rotated = torch.polar(torch.full_like(angles, scale), angles)
        return torch.cat([rotated.new_ones(num_positions, 1, 1, self.num_unrotated // 2), rotated], dim=-1)


def rotate_pairs(x: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """Rotate ``[s, b, n, d]``, in which the numbers of a pair are neighbors. Computed in fp32."""
    pairs = torch.view_as_complex(x.float().contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations).flatten(-2).to(x.dtype)


def rotate_halves(x: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """Rotate ``[s, b, n, d]``, in which number i is paired with i + d / 2; pairs become neighbors. Computed in fp32."""
    # torch.complex would save both halves for its backward pass.
    pairs = torch.view_as_complex(torch.stack(x.float().chunk(2, dim=-1), dim=-1))
    return torch.view_as_real(pairs * rotations).flatten(-2).to(x.dtype)


def _embedding(attention: AttentionConfig, cp_group: torch.distributed.ProcessGroup) -> RotaryEmbedding:
    """The angles of each position. :func:`softmax_scale`, or Megatron's latent attention, adds YaRN's logit scale."""
    rope = attention.rope
    if attention.type == "gqa":
        embedding = RotaryEmbedding(
            attention.kv_channels, rotary_percent=1.0, rotary_base=rope.rotary_base, cp_group=cp_group
        )
        rescale = {"yarn": yarn_frequencies, "llama3": llama3_frequencies}.get(rope.rope_type)
        if rescale is not None:
            embedding.inv_freq = rescale(embedding.inv_freq, rope)
        return embedding
    if rope.rope_type == "rope":
        return RotaryEmbedding(
            attention.qk_pos_emb_head_dim, rotary_percent=1.0, rotary_base=rope.rotary_base, cp_group=cp_group
        )
    return YarnRotaryEmbedding(
        attention.qk_pos_emb_head_dim,
        rotary_base=rope.rotary_base,
        scaling_factor=rope.rotary_scaling_factor,
        original_max_position_embeddings=rope.original_max_position_embeddings,
        beta_fast=rope.beta_fast,
        beta_slow=rope.beta_slow,
        mscale=rope.mscale,
        mscale_all_dim=rope.mscale_all_dim,
        cp_group=cp_group,
    )


def yarn_frequencies(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """YaRN's frequencies ``[d / 2]`` (arXiv 2309.00071, section 3.2) from the unscaled ones.

    Frequencies with more than ``beta_fast`` rotations over the original length are kept. Those with fewer than
    ``beta_slow`` are divided by ``rotary_scaling_factor``, with a linear ramp over the indices between.
    """

    def index(rotations: float) -> float:
        """Index of the frequency that makes this many rotations over the original length."""
        return (
            len(frequencies)
            * math.log(rope.original_max_position_embeddings / (2 * math.pi * rotations))
            / math.log(rope.rotary_base)
        )

    first = max(math.floor(index(rope.beta_fast)), 0)
    last = min(math.ceil(index(rope.beta_slow)), 2 * len(frequencies) - 1)
    place = torch.arange(len(frequencies), device=frequencies.device)
    slowed = ((place - first) / max(last - first, 1e-3)).clamp(0, 1)
    return frequencies * (1 - slowed + slowed / rope.rotary_scaling_factor)


def llama3_frequencies(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Llama 3.1's frequencies ``[d / 2]`` for a context ``rotary_scaling_factor`` times as long, from unscaled ones.

    Low frequencies are divided by the factor, high ones are kept, and those between are interpolated by their rotations
    over the original length. The limits, 1 and 4 rotations, are those of all published configurations.
    """
    low, high = _LLAMA3_ROTATIONS
    rotations = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = ((rotations - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / rope.rotary_scaling_factor)


def softmax_scale(attention: AttentionConfig) -> float:
    """The factor on the logits of grouped-query attention.

    YaRN (section 3.4) multiplies queries and keys by ``m(mscale) / m(mscale_all_dim)``, where
    ``m(x) = 0.1 x ln(rotary_scaling_factor) + 1``. Since the whole head is rotated, this is a factor on the logits.
    """
    scale = 1 / math.sqrt(attention.kv_channels)
    rope = attention.rope
    if rope.rope_type != "yarn" or rope.rotary_scaling_factor <= 1:
        return scale
    mscale, all_dim = (0.1 * m * math.log(rope.rotary_scaling_factor) + 1 for m in (rope.mscale, rope.mscale_all_dim))
    return scale * (mscale / all_dim) ** 2
