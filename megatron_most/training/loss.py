"""Losses as (sum, count) pairs: per target, per modality, per task, per codebook.

A rank sums over its own positions and never divides; the division follows the sum over all ranks, so that no mean
depends on how positions were split over ranks or micro-batches.

Shape letters: b rows, s positions, C codebooks, R rows of the metric table.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron_most.data.loading.batch import Batch
from megatron_most.data.storage.documents import TASKS
from megatron_most.errors import ConfigError
from megatron_most.vocab import NO_CODE, Modality, VocabLayout


class _Constants(NamedTuple):
    """On the device of the losses: ``weights [C]`` fp32 and the indices of modalities, tasks and codebooks."""

    weights: torch.Tensor
    modalities: torch.Tensor
    tasks: torch.Tensor
    codebooks: torch.Tensor


class LossTable:
    """Turns the model's losses into the training loss and the table of metrics.

    A target is a position with loss mask 1; its modality is that of the id it predicts. The loss of a target is the
    main head's cross entropy; where codes are predicted beside it (layout ``frame``), plus their weighted sum; where it
    is itself a code (layout ``flat``), times its codebook's weight.

    Rows of the table, each reduced as sum over ranks of (sum, count), then sum / count:

    - ``loss``: mean over all targets;
    - ``loss/<modality>``: mean over targets of that modality (the target's whole loss);
    - ``loss/<task>``: mean over the targets of that task's documents;
    - ``loss/codebook_<k>``: mean cross entropy, unweighted, over targets that have a code of codebook k;
    - ``tokens``: sum is the number of positions that are not padding, count the number of rows.

    Args:
        weights: loss weight of each codebook.
        text_weight: weight of a text target in the training loss; the metrics are not weighted by it.

    Raises:
        ConfigError: a modality is called as a task or codebook is, so that their rows would be one.
    """

    def __init__(self, vocab: VocabLayout, weights: list[float], text_weight: float = 1.0) -> None:
        self.vocab = vocab
        self.weights = weights
        self._constants_of: dict[torch.device, _Constants] = {}
        self.text_weight = text_weight
        codebooks = [f"codebook_{k}" for k in range(vocab.num_codebooks)]
        self.names = ["loss", *(f"loss/{name}" for name in (*vocab.modality_names, *TASKS, *codebooks)), "tokens"]
        clashes = {name for name in vocab.modality_names if self.names.count(f"loss/{name}") > 1}
        if clashes:
            raise ConfigError(f"vocab.further_modalities: {', '.join(clashes)} is the name of a task or codebook")

    def __call__(self, batch: Batch, slot_losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Reduce one micro-batch on this rank.

        Args:
            slot_losses: ``[b, s, 1 + C]``, or ``[b, s, 1]`` in layout ``flat``; unmasked, 0 without a code label.

        Returns:
            The sum of the loss over targets (with its graph), the number of targets (int32), and the detached table
            ``[R, 2]`` float64 of (sum, count), rows as in :attr:`names`.
        """
        slot_losses = slot_losses.float()
        constants = self._constants(slot_losses.device)
        mask = batch.loss_mask.to(slot_losses.dtype)
        main, codebooks = slot_losses[..., 0], slot_losses[..., 1:]
        if self.vocab.codec_layout.uses_side_codes:
            losses = main + codebooks @ constants.weights
        else:
            codebook, is_code = self._codebook_of(batch.labels)
            losses = main * constants.weights[codebook].where(is_code, 1.0)
        modality = self.vocab.modality_of(batch.labels)
        weighted = mask
        if self.text_weight != 1:
            weighted = mask.where(modality != Modality.TEXT, mask * self.text_weight)
        loss_sum = (losses * weighted).sum()
        with torch.no_grad():
            # Sums over positions are products with what each row of the table selects.
            pairs = torch.stack([losses * mask, mask]).double().flatten(1)
            selected = torch.cat([modality == constants.modalities, batch.task == constants.tasks]).flatten(1)
            total = pairs.sum(dim=1, keepdim=True).T
            positions = (~batch.is_padding).sum(dtype=torch.float64).view(1, 1)
            tokens = torch.nn.functional.pad(positions, (0, 1), value=batch.ids.shape[0])
            per_codebook = self._codebooks(batch, slot_losses, pairs[1], constants)
            table = torch.cat([total, selected.double() @ pairs.T, per_codebook, tokens])
        return loss_sum, total[0, 1].int(), table

    def _codebooks(
        self, batch: Batch, slot_losses: torch.Tensor, mask: torch.Tensor, constants: _Constants
    ) -> torch.Tensor:
        """``[C, 2]`` (sum, count) of every codebook's cross entropy; ``mask [b * s]`` is float64."""
        if self.vocab.codec_layout.uses_side_codes:
            has_code, losses = (batch.code_labels != NO_CODE).double(), slot_losses[..., 1:]
        else:
            codebook, is_code = self._codebook_of(batch.labels)
            has_code = ((codebook[..., None] == constants.codebooks) & is_code[..., None]).double()
            losses = slot_losses[..., :1]
        return (mask @ torch.cat([losses * has_code, has_code], dim=-1).flatten(0, 1)).view(2, -1).T

    def _constants(self, device: torch.device) -> _Constants:
        """Made once: to copy a list makes the host wait for a GPU."""
        if device not in self._constants_of:
            self._constants_of[device] = _Constants(
                weights=torch.tensor(self.weights, dtype=torch.float32).to(device),
                modalities=torch.arange(len(self.vocab.modality_names), device=device)[:, None, None],
                tasks=torch.arange(len(TASKS), device=device)[:, None, None],
                codebooks=torch.arange(self.vocab.num_codebooks, device=device),
            )
        return self._constants_of[device]

    def _codebook_of(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Layouts whose codes are ids: the codebook of each label, and whether it is a code at all."""
        code = labels - self.vocab.codec_layout.first_code_id
        codebook = torch.div(code, self.vocab.codebook_size, rounding_mode="floor")
        is_code = (code >= 0) & (codebook < self.vocab.num_codebooks)
        return codebook.where(is_code, 0), is_code
