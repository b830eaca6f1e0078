"""How one choice is drawn from logits.

Shape letters: ... any batch dimensions, V choices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_most.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """Greedy at ``temperature`` 0; otherwise top-k (0: off) and then top-p (1: off) sampling, seeded."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"temperature={self.temperature}: must not be negative")
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k}: must not be negative")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: must be in (0, 1]")

    def generator(self, device: torch.device) -> torch.Generator:
        """The random numbers of one call of the generator."""
        return torch.Generator(device).manual_seed(self.seed)

    def choose(self, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """``logits [..., V]`` (``-inf`` forbids a choice) -> indices ``[...]``."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        logits = logits / self.temperature
        if self.top_k:
            kth = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < kth, float("-inf"))
        probs = torch.softmax(logits, dim=-1)
        if self.top_p < 1:
            ordered, order = probs.sort(dim=-1, descending=True)
            # Keep each choice whose better ones do not reach top_p yet: the best one always stays.
            dropped = ordered.cumsum(dim=-1) - ordered >= self.top_p
            probs = probs.masked_fill(dropped.scatter(-1, order, dropped), 0)
        flat = torch.multinomial(probs.flatten(0, -2), 1, generator=generator)
        return flat.view(probs.shape[:-1])
