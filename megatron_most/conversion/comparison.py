"""How the logits of two models differ, collected from blocks of ids, so that they are never in memory for all ids.

Shape letters: b rows, s positions, n = b * s tokens, k ids of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Comparison:
    """How two models differ on the same tokens.

    Args:
        max_difference, mean_difference: absolute differences of logits.
        largest_logit: largest absolute logit of the first model, to which differences are related.
        top1_agreement: fraction of positions with the same most likely id.
        perplexities: of the first and the second model on the tokens.
        layers: largest difference of hidden states after each layer, relative to the largest hidden state there.
        tokens: number of tokens compared.
    """

    max_difference: float
    mean_difference: float
    largest_logit: float
    top1_agreement: float
    perplexities: tuple[float, float]
    layers: list[float]
    tokens: int

    @property
    def relative_difference(self) -> float:
        return self.max_difference / self.largest_logit

    def first_difference(self, tolerance: float) -> int | None:
        """The first layer after which the models differ by more than ``tolerance``."""
        return next((layer for layer, value in enumerate(self.layers) if not value <= tolerance), None)

    def describe(self) -> str:
        first, second = self.perplexities
        return (
            f"logits of {self.tokens} tokens differ by at most {self.relative_difference:.1e} of the largest (mean"
            f" {self.mean_difference:.1e} absolute), same top-1 on {self.top1_agreement:.1%}, perplexity {first:.4f}"
            f" and {second:.4f}"
        )


class LogitComparison:
    """What is said of the logits of two models, collected from blocks of them.

    Args:
        tokens: ``[b, s]``, foreign ids.
    """

    def __init__(self, tokens: torch.Tensor) -> None:
        self._tokens = tokens
        n = tokens.numel()
        self._labels = tokens.roll(-1, dims=1).flatten()  # the last one of each row is left out later
        self._gap = self._total = self._largest = torch.zeros(())
        self._count = 0
        self._best = [(torch.full((n,), -torch.inf), torch.full((n,), -1)) for _ in range(2)]
        self._normalizers = [torch.full((n,), -torch.inf) for _ in range(2)]
        self._of_labels = [torch.zeros(n) for _ in range(2)]

    def add(self, start: int, first: torch.Tensor, second: torch.Tensor) -> None:
        """Logits ``[n, k]`` of both models for the ``k`` foreign ids from ``start``."""
        gap = (first - second).abs()
        # torch's maximum keeps NaN, Python's does not.
        self._gap, self._total = torch.maximum(self._gap, gap.max()), self._total + gap.double().sum()
        self._largest = torch.maximum(self._largest, first.abs().max())
        self._count += gap.numel()
        here = ((self._labels >= start) & (self._labels < start + first.shape[1])).nonzero().flatten()
        for model, logits in enumerate((first, second)):
            values, places = logits.max(dim=1)
            best, ids = self._best[model]
            is_better = values > best
            self._best[model] = (values.where(is_better, best), (places + start).where(is_better, ids))
            self._normalizers[model] = torch.logaddexp(self._normalizers[model], logits.logsumexp(dim=1))
            self._of_labels[model][here] = logits[here, self._labels[here] - start]

    def comparison(self, layers: list[float]) -> Comparison:
        losses = [
            (normalizer - of_label).view(self._tokens.shape)[:, :-1].mean()
            for normalizer, of_label in zip(self._normalizers, self._of_labels, strict=True)
        ]
        first, second = (loss.exp().item() for loss in losses)
        (_, ids), (_, others) = self._best
        return Comparison(
            max_difference=self._gap.item(),
            mean_difference=self._total.item() / self._count,
            largest_logit=self._largest.item(),
            top1_agreement=(ids == others).float().mean().item(),
            perplexities=(first, second),
            layers=layers,
            tokens=self._tokens.numel(),
        )
