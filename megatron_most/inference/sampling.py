"""Sampling from logits.

Shape letters: ... any batch dimensions, V choices.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass

import torch

from megatron_most.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """Greedy at ``temperature`` 0. Otherwise seeded sampling: temperature, then top-k (0: off), then top-p (1: off)."""

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

    @property
    def is_random(self) -> bool:
        return self.temperature > 0

    def with_seed(self, seed: int) -> Sampling:
        return dataclasses.replace(self, seed=seed)

    def generator(self, device: torch.device, prompt: bytes) -> torch.Generator:
        """The random number generator for the continuation of ``prompt``, whatever else is in its batch."""
        digest = hashlib.blake2b(f"{self.seed}:".encode() + prompt, digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "little", signed=True))

    def choose(self, logits: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """``logits [..., V]``, -inf for forbidden choices -> indices ``[...]``. The host does not wait for the device.

        Args:
            noise: ``[..., V]`` from the exponential distribution with mean 1; None at ``temperature`` 0.
        """
        if noise is None:
            return logits.argmax(dim=-1)
        logits = logits / self.temperature
        if self.top_k:
            kth = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < kth, float("-inf"))
        probs = torch.softmax(logits, dim=-1)
        if self.top_p < 1:
            ordered, order = probs.sort(dim=-1, descending=True)
            # Drop a choice if those before it reach top_p; the best one always stays.
            dropped = ordered.cumsum(dim=-1) - ordered >= self.top_p
            probs = probs.masked_fill(dropped.scatter(-1, order, dropped), 0)
        # Exponential race: noise / probs has rates probs, so its smallest entry is i with probability probs[i].
        return (probs / noise).argmax(dim=-1)
