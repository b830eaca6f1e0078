"""Per-tensor scales from the past: the state of the recipe ``delayed``."""

from __future__ import annotations

import torch

from megatron_most.precision.formats import tensor_scale

ROLES = ("input", "weight", "gradient")


class AmaxHistory:
    """Largest magnitudes of the three tensors of a product over the last steps; of each expert's for grouped ones.

    The scale is the same in all micro-batches of a step and in what is computed again in its backward, because the
    history moves between steps alone. Until a history holds a step, the current values decide.

    Args:
        steps: how many steps count.
        count: products that share the history's tensors: experts, 1 for a linear layer.
    """

    def __init__(self, steps: int, count: int, device: torch.device | int) -> None:
        self.past = torch.zeros(steps, len(ROLES), count, device=device)
        self.current = torch.zeros(len(ROLES), count, device=device)
        self._next = 0

    def scale(self, role: str, amax: torch.Tensor, name: str, is_recorded: bool) -> torch.Tensor:
        """The scale ``[count]`` to use now; ``amax [count]`` counts for this step if it ``is_recorded``."""
        index = ROLES.index(role)
        if is_recorded:
            torch.maximum(self.current[index], amax, out=self.current[index])
        known = self.past[:, index].amax(dim=0)
        return tensor_scale(torch.where(known > 0, known, amax), name)

    def advance(self, largest: torch.Tensor) -> None:
        """End a step with ``largest``, ``current`` over all ranks that hold parts or copies of the tensors."""
        self.past[self._next % len(self.past)] = largest
        self.current.zero_()
        self._next += 1

    def oldest_first(self) -> torch.Tensor:
        """A copy of ``past [steps, roles, count]`` between two steps, for a checkpoint."""
        return self.past.roll(-(self._next % len(self.past)), dims=0)

    def restore(self, past: torch.Tensor) -> None:
        """Go on from what :meth:`oldest_first` gave."""
        self.past.copy_(past)
        self._next = 0
