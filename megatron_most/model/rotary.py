"""Rotary position embedding: built here for grouped-query attention, by each layer of multi-latent attention itself.

Shape letters: d head size; a head has d / 2 frequencies, in radians per position, from fast to slow; s positions of
this rank, t of a row over all context-parallel ranks.
"""

from __future__ import annotations

import math

import torch
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.models.common.embeddings import RotaryEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_most.config.model import AttentionConfig, RopeConfig
from megatron_most.model.packed_row import PackedRow

_LLAMA3_ROTATIONS = (1.0, 4.0)
"""Rotations over the original length below which a frequency is slowed down fully, and above which not at all."""


def rotary_embedding(attention: AttentionConfig, cp_group: torch.distributed.ProcessGroup) -> RotaryEmbedding:
    """The angles of each position, for all layers. YaRN's other half is in :func:`softmax_scale`."""
    embedding = RotaryEmbedding(
        attention.kv_channels, rotary_percent=1.0, rotary_base=attention.rope.rotary_base, cp_group=cp_group
    )
    rescale = {"yarn": yarn_frequencies, "llama3": llama3_frequencies}.get(attention.rope.rope_type)
    if rescale is not None:
        embedding.inv_freq = rescale(embedding.inv_freq, attention.rope)
    return embedding


def row_angles(embedding: RotaryEmbedding, row: PackedRow) -> torch.Tensor:
    """Angles ``[t, 1, 1, d]`` of a packed row, which start anew with each document.

    Megatron (0.19.2, rope_utils.py:178) takes angles of a whole row as they are. Of the longest document alone it would
    rotate one document after another, some twenty kernels each.
    """
    return embedding(row.max_seqlen_q, packed_seq=True)[row.document_positions]


class LatentRotary(torch.nn.Module):
    """The embedding of a layer of multi-latent attention, with the angles of every position of a packed row.

    The layer asks for the length that its input needs and then for the angles of so many positions. A packed row is the
    answer to the first question, for the second one to know it.
    """

    def __init__(self, embedding: RotaryEmbedding) -> None:
        super().__init__()
        self.embedding = embedding

    def get_rotary_seq_len(
        self,
        inference_context: BaseInferenceContext | None,
        transformer: torch.nn.Module | None,
        transformer_input: torch.Tensor,
        transformer_config: TransformerConfig,
        packed_seq_params: PackedRow | None = None,
    ) -> int | PackedRow:
        if packed_seq_params is not None:
            return packed_seq_params
        return self.embedding.get_rotary_seq_len(
            inference_context, transformer, transformer_input, transformer_config, None
        )

    def forward(self, length: int | PackedRow, packed_seq: bool = False) -> torch.Tensor | tuple[torch.Tensor, float]:
        """Angles ``[length, 1, 1, d]``, or ``[s, 1, d]`` of a packed row; with a scale where the embedding has one."""
        if not isinstance(length, PackedRow):
            return self.embedding(length, packed_seq=packed_seq)
        row = length
        found = self.embedding(row.max_seqlen_q, packed_seq=True)
        positions = row.document_positions if row.positions is None else row.document_positions[row.positions]
        if isinstance(found, tuple):
            angles, scale = found
            return angles[:, 0][positions], scale
        return found[:, 0][positions]


def yarn_frequencies(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """YaRN's frequencies ``[d / 2]`` (arXiv 2309.00071, section 3.2) from the unscaled ones.

    Those that turn more than ``beta_fast`` times within the original length stay, those that turn less than
    ``beta_slow`` times are divided by ``rotary_scaling_factor``, with a linear ramp over the indices between.
    """

    def index(rotations: float) -> float:
        """Where in the head the frequency stands that turns so often within the original length."""
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

    Slow ones are divided by the factor, fast ones stay, those between are interpolated by how often they turn within
    the original length (as the configuration of the published weights says; factors 1 and 4 in all of them).
    """
    low, high = _LLAMA3_ROTATIONS
    rotations = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = ((rotations - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / rope.rotary_scaling_factor)


def softmax_scale(attention: AttentionConfig) -> float:
    """What grouped-query attention multiplies its logits by.

    YaRN (section 3.4) scales queries and keys alike by ``m(mscale) / m(mscale_all_dim)``, where
    ``m(x) = 0.1 x ln(rotary_scaling_factor) + 1``. As all of a head is rotated, that is a factor on the logits.
    """
    scale = 1 / math.sqrt(attention.kv_channels)
    rope = attention.rope
    if rope.rope_type != "yarn" or rope.rotary_scaling_factor <= 1:
        return scale
    mscale, all_dim = (0.1 * m * math.log(rope.rotary_scaling_factor) + 1 for m in (rope.mscale, rope.mscale_all_dim))
    return scale * (mscale / all_dim) ** 2
