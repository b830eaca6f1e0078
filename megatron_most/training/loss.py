"""Losses as (sum, count) pairs: over all targets, per modality, per task, and per codebook.

A rank only sums over its own positions. The division follows the sum over all ranks, so that means do not depend on how
positions are split over ranks and micro-batches.

Shape letters: b rows, s positions, C codebooks, R rows of the metric table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_most.codec_layouts import FlatLayout
from megatron_most.data.loading.batch import Batch
from megatron_most.data.storage.documents import TASKS
from megatron_most.errors import ConfigError
from megatron_most.vocab import NO_CODE, Modality, VocabLayout


@dataclass(frozen=True)
class _Constants:
    """The constants of a loss table on one device, for M modalities and T tasks.

    codebook_weights ``[C]`` and modality_weights ``[M]``; the indices of codebooks ``[C]``, modalities ``[M, 1, 1]``,
    and tasks ``[T, 1, 1]``.
    """

    codebook_weights: torch.Tensor
    modality_weights: torch.Tensor
    codebooks: torch.Tensor
    modalities: torch.Tensor
    tasks: torch.Tensor


class LossTable:
    """Turns the model's losses into the training loss and the table of metrics.

    A target is a position with loss mask 1. Its modality is that of the id to predict. Its loss is the cross entropy of
    the main head, plus the weighted sum of the codebook losses if it is a codec frame (layout ``frame``), or times the
    weight of its codebook if the id is a code (layout ``flat``).

    Each row of the table is a (sum, count) pair. It is summed over ranks; the metric is sum / count:

    - ``loss``: over all targets;
    - ``loss/<modality>``: over the targets of that modality;
    - ``loss/<task>``: over the targets of that task's documents;
    - ``loss/codebook_<k>``: cross entropy, unweighted, over targets that have a code of codebook k;
    - ``tokens``: the sum is the number of positions that are not padding, the count the number of rows.

    Args:
        weights: loss weight of each codebook.
        text_weight: weight of text targets in the training loss. It does not affect the metrics.

    Raises:
        ConfigError: a modality has the name of a task or codebook.
    """

    def __init__(self, vocab: VocabLayout, weights: list[float], text_weight: float = 1.0) -> None:
        self.vocab = vocab
        self.weights = weights
        self.text_weight = text_weight
        codebooks = [f"codebook_{k}" for k in range(vocab.num_codebooks)]
        self.names = ["loss", *(f"loss/{name}" for name in (*vocab.modality_names, *TASKS, *codebooks)), "tokens"]
        clashes = {name for name in vocab.modality_names if self.names.count(f"loss/{name}") > 1}
        if clashes:
            raise ConfigError(f"vocab.further_modalities: {', '.join(clashes)} is the name of a task or codebook")
        self._constants: dict[torch.device, _Constants] = {}

    def __call__(self, batch: Batch, slot_losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Reduce one micro-batch on this rank.

        Args:
            slot_losses: ``[b, s, 1 + C]``, or ``[b, s, 1]`` in layout ``flat``; 0 where there is no code label.

        Returns:
            The sum of the loss over targets (differentiable), the number of targets (int32), and the detached table
            ``[R, 2]`` float64 with the rows :attr:`names`.
        """
        slot_losses = slot_losses.float()
        mask = batch.loss_mask.to(slot_losses.dtype)
        main, codebooks = slot_losses[..., 0], slot_losses[..., 1:]
        constants = self._constants_on(main.device)
        modality = self.vocab.modality_of(batch.labels)
        if self.vocab.codec_layout.uses_side_codes:
            assert batch.code_labels is not None
            losses = main + codebooks @ constants.codebook_weights
            has_code, code_losses = batch.code_labels != NO_CODE, codebooks
        else:
            codebook, is_code = self._codebook_of(batch.labels)
            losses = main * constants.codebook_weights[codebook].where(is_code, 1.0)
            has_code, code_losses = (codebook[..., None] == constants.codebooks) & is_code[..., None], main[..., None]
        loss_sum = (losses * (mask * constants.modality_weights[modality])).sum()
        with torch.no_grad():
            is_row = torch.cat([modality == constants.modalities, batch.task == constants.tasks])
            rows = torch.cat([mask[None], mask * is_row]).double()
            chosen = (has_code * mask[..., None]).double()
            counts = torch.cat([rows.sum(dim=(1, 2)), chosen.sum(dim=(0, 1)), rows.new_full((1,), len(mask))])
            num_positions = (~batch.is_padding).sum(dtype=torch.double)
            sums = [(rows * losses).sum(dim=(1, 2)), (code_losses * chosen).sum(dim=(0, 1)), num_positions[None]]
            table = torch.stack([torch.cat(sums), counts], dim=1)
        return loss_sum, counts[0].int(), table

    def _constants_on(self, device: torch.device) -> _Constants:
        """Cached, because copying a list to the device makes the host wait for it."""
        if device not in self._constants:
            num_modalities = len(self.vocab.modality_names)
            modality_weights = torch.ones(num_modalities)
            modality_weights[Modality.TEXT] = self.text_weight
            self._constants[device] = _Constants(
                codebook_weights=torch.tensor(self.weights).to(device),
                modality_weights=modality_weights.to(device),
                codebooks=torch.arange(self.vocab.num_codebooks, device=device),
                modalities=torch.arange(num_modalities, device=device)[:, None, None],
                tasks=torch.arange(len(TASKS), device=device)[:, None, None],
            )
        return self._constants[device]

    def _codebook_of(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Layout ``flat``: the codebook of each label, and whether the label is a code."""
        layout = self.vocab.codec_layout
        assert isinstance(layout, FlatLayout)
        code = labels - layout.first_code_id
        codebook = torch.div(code, self.vocab.codebook_size, rounding_mode="floor")
        is_code = (code >= 0) & (codebook < self.vocab.num_codebooks)
        return codebook.where(is_code, 0), is_code
