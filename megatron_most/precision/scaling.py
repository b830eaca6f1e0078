"""Scales from earlier steps: the state of the recipe ``delayed``."""

from __future__ import annotations

import torch

from megatron_most.precision.formats import tensor_scale

ROLES = ("input", "weight", "gradient")


class AmaxHistory:
    """The largest magnitudes of a product's three tensors in the last steps, separately for each expert.

    The history changes only between steps, so all micro-batches of a step and the layers recomputed in its backward
    share one scale. In the first step, the scale comes from the current tensor.

    Args:
        steps: number of steps that the history holds.
        count: experts; 1 for a linear layer.
    """

    def __init__(self, steps: int, count: int, device: torch.device | int) -> None:
        self.past = torch.zeros(steps, len(ROLES), count, device=device)
        self.current = torch.zeros(len(ROLES), count, device=device)
        self._next = 0

    def scale(self, role: str, amax: torch.Tensor, name: str, is_recorded: bool) -> torch.Tensor:
        """The scale ``[count]`` to use now. If ``is_recorded``, ``amax [count]`` is added to the current step."""
        index = ROLES.index(role)
        if is_recorded:
            torch.maximum(self.current[index], amax, out=self.current[index])
        known = self.past[:, index].amax(dim=0)
        return tensor_scale(torch.where(known > 0, known, amax), name)

    def advance(self, largest: torch.Tensor) -> None:
        """End a step. ``largest`` is ``current``, reduced over all ranks that hold shards or copies of the tensors."""
        self.past[self._next % len(self.past)] = largest
        self.current.zero_()
        self._next += 1

    def oldest_first(self) -> torch.Tensor:
        """A copy of ``past [steps, roles, count]`` in the order of steps, for checkpoints. Call it between steps."""
        return self.past.roll(-(self._next % len(self.past)), dims=0)

    def restore(self, past: torch.Tensor) -> None:
        """Continue from the result of :meth:`oldest_first`."""
        self.past.copy_(past)
        self._next = 0
