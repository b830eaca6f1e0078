"""What the router must know of each token, as one boolean tensor: the planes.

Megatron-Core carries exactly one per-token tensor, ``padding_mask`` ``[b, s]``, from the model through the transformer
block, activation recomputation and the MoE layer to the router. We stack our planes on its batch axis. Because the
tensor is an argument all the way, a layer that is recomputed sees the tensor of its own micro-batch; state held in a
module or a context would show it the latest one.

The planes are the bits of the modality's index, lowest first, and then padding.

Shape letters: b micro-batch rows, s positions, P planes.
"""

from __future__ import annotations

import torch


def num_planes(num_modalities: int) -> int:
    """Planes that hold the index of one of ``num_modalities``, and padding."""
    return (num_modalities - 1).bit_length() + 1


def pack_planes(modality: torch.Tensor, is_padding: torch.Tensor, num_modalities: int) -> torch.Tensor:
    """``modality [b, s]`` and ``is_padding [b, s]`` -> planes ``[P * b, s]`` bool for the model's ``padding_mask``."""
    bits = [(modality >> bit & 1).bool() for bit in range(num_planes(num_modalities) - 1)]
    return torch.cat([*bits, is_padding.bool()], dim=0)


def unpack_planes(planes: torch.Tensor, num_modalities: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Planes as the MoE layer hands them on, ``[s, P * b]`` -> ``[s, b]`` modality (int64) and is_padding (bool)."""
    *bits, is_padding = planes.chunk(num_planes(num_modalities), dim=1)
    modality = torch.zeros(is_padding.shape, dtype=torch.long, device=planes.device)
    for bit, plane in enumerate(bits):
        modality += plane.long() << bit
    return modality, is_padding
