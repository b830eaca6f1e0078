"""What is changed in Megatron on which machine."""

from __future__ import annotations

import pytest
import torch
from megatron.core.extensions import transformer_engine as te
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.transformer import multi_latent_attention as mla
from megatron.core.transformer.moe import token_dispatcher

from megatron_most.platform import cpu_stand_ins


@pytest.mark.skipif(te.HAVE_TE, reason="Transformer Engine is installed")
def test_with_cuda_only_what_transformer_engine_leaves_wrong_is_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    # As Megatron leaves it when it is imported without Transformer Engine.
    monkeypatch.setattr(mla, "Linear", None)
    monkeypatch.setattr(cpu_stand_ins, "_installed", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = (torch.zeros, torch.Tensor.cuda, torch.distributed.all_gather, token_dispatcher.maybe_move_tensor_to_cpu)

    cpu_stand_ins.install()

    assert mla.Linear is Linear
    after = (torch.zeros, torch.Tensor.cuda, torch.distributed.all_gather, token_dispatcher.maybe_move_tensor_to_cpu)
    assert after == before
