"""Sampling from logits.

Shape letters: ... any batch dimensions, V choices.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from megatron_most.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """Greedy at ``temperature`` 0. Otherwise seeded sampling: temperature, then top-k (0: off), then top-p (1: off).

    repetition_penalty: what a positive logit is divided by, and a negative one multiplied by, of each text id that the
        prompt or the answer has (Keskar et al. 2019, https://arxiv.org/abs/1909.05858). 1: off. Audio has none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature={self.temperature}: must be a number, and not negative")
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k}: must not be negative")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: must be in (0, 1]")
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"repetition_penalty={self.repetition_penalty}: must be a number greater than 0")

    @property
    def is_random(self) -> bool:
        return self.temperature > 0

    def with_seed(self, seed: int) -> Sampling:
        return dataclasses.replace(self, seed=seed)

    def generator(self, device: torch.device, prompt: bytes) -> torch.Generator:
        """The random number generator for the continuation of ``prompt``, whatever else is in its batch."""
        digest = hashlib.blake2b(f"{self.seed}:".encode() + prompt, digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "little", signed=True))

    def penalize(self, logits: torch.Tensor, is_said: torch.Tensor) -> None:
        """Apply ``repetition_penalty`` in place to ``logits [b, V]`` where ``is_said [b, V]``."""
        penalty = self.repetition_penalty
        logits.copy_(torch.where(is_said, torch.where(logits > 0, logits / penalty, logits * penalty), logits))

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


@dataclass(frozen=True)
class Decoding:
    """How answers are generated.

    Args:
        max_new: the maximum number of ids of a text; None: what the context leaves.
        max_seconds: the maximum length of speech; None: what the context leaves.
    """

    max_new: int | None = None
    max_seconds: float | None = None
    sampling: Sampling = field(default_factory=Sampling)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
