"""Planes: the modality and padding of every token, as one boolean tensor.

Megatron-Core passes exactly one per-token tensor, ``padding_mask [b, s]``, from the model through the transformer
block, activation recomputation, and the MoE layer to the router. The planes are stacked on its batch axis. Because the
tensor is an argument all the way, a recomputed layer sees the planes of its own micro-batch. State in a module would
show it those of the latest one.

There is one plane for each modality and one for padding. Each token is in exactly one of them.

Shape letters: b micro-batch rows, s positions, n = s * b tokens, M modalities.
"""

from __future__ import annotations

import torch


def pack_planes(modality: torch.Tensor, is_padding: torch.Tensor, num_modalities: int) -> torch.Tensor:
    """``modality [b, s]`` and ``is_padding [b, s]`` -> planes ``[(M + 1) * b, s]`` for the model's ``padding_mask``."""
    plane = modality.masked_fill(is_padding.bool(), num_modalities)
    return (plane == torch.arange(num_modalities + 1, device=plane.device)[:, None, None]).flatten(0, 1)


def unpack_planes(planes: torch.Tensor, num_modalities: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Read planes ``[s, (M + 1) * b]``, transposed as the MoE layer passes them on.

    Returns:
        ``plane [n]`` int64, the token's modality, or M for padding; and ``membership [M, n]`` fp32, 1 where the token
        is of that modality and not padding, else 0.
    """
    by_plane = planes.unflatten(1, (num_modalities + 1, -1))
    plane = by_plane.view(torch.uint8).argmax(dim=1).view(-1)
    modalities = by_plane[:, :num_modalities].transpose(0, 1)
    membership = modalities.to(torch.float32, memory_format=torch.contiguous_format)
    return plane, membership.view(num_modalities, -1)
