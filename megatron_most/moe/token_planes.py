"""What the router must know of each token, as one boolean tensor: the planes.

Megatron-Core carries exactly one per-token tensor, ``padding_mask`` ``[b, s]``, from the model through the transformer
block, activation recomputation and the MoE layer to the router. We stack our planes on its batch axis. Because the
tensor is an argument all the way, a layer that is recomputed sees the tensor of its own micro-batch; state held in a
module or a context would show it the latest one.

Shape letters: b micro-batch rows, s positions.
"""

from __future__ import annotations

import torch

from megatron_most.vocab import Modality


def pack_planes(modality: torch.Tensor, is_padding: torch.Tensor) -> torch.Tensor:
    """``modality [b, s]`` and ``is_padding [b, s]`` -> planes ``[2b, s]`` bool for the model's ``padding_mask``."""
    return torch.cat([modality == Modality.AUDIO, is_padding.bool()], dim=0)


def unpack_planes(planes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Planes as the MoE layer hands them on, ``[s, 2b]`` -> ``modality [s, b]`` int64, ``is_padding [s, b]`` bool."""
    is_audio, is_padding = planes.chunk(2, dim=1)
    return is_audio.long(), is_padding
