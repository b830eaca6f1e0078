"""This project's implementation of the model in a checkpoint, one layer at a time: a model of one layer, filled anew.

Shape letters: b rows, s positions, h hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_most import platform
from megatron_most.checkpointing.regions import Region, StateReader
from megatron_most.config import RunConfig
from megatron_most.config.load import build_config
from megatron_most.conversion.foreign_layers import Carried, rows_of
from megatron_most.conversion.native import EMBEDDING, HEAD
from megatron_most.model import MoSTModel, build_model

_LAYER, _NORM = "decoder.layers.", "decoder.final_layernorm."
PORTABLE = {"expert_backend": "sequential", "moe_token_dispatcher_type": "alltoall", "moe_shared_expert_overlap": False}
"""Settings of the experts that work on any machine."""


class NativeLayers:
    """The layers of the model in a checkpoint's ``state`` folder, in fp32 on this process's device.

    Start :mod:`megatron_most.parallel` with all parallel sizes 1 before. No call communicates.

    Args:
        tokens, modality: ``[b, s]``.
    """

    def __init__(self, config: RunConfig, state: Path, tokens: torch.Tensor, modality: torch.Tensor) -> None:
        self._config, self._name, self._reader = config, str(state.parent), StateReader(state)
        self._tokens, self._modality = tokens, modality
        self._model: MoSTModel | None = None
        self._pieces: list[tuple[Region, torch.Tensor]] = []
        self._is_dense: bool | None = None

    def embed(self) -> torch.Tensor:
        """``[b, s, h]``, on the CPU."""
        num_rows = self._reader.forms[EMBEDDING].shape[0]
        return rows_of(self._tokens, num_rows, lambda start, rows: self._rows(EMBEDDING, start, rows))

    @torch.no_grad()
    def run(self, layer: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states ``[b, s, h]`` after a layer, and the final norm of them, both on the CPU."""
        model = self._model_of(layer)
        device = platform.device()
        model.embedding = Carried(hidden.transpose(0, 1).contiguous().to(device))
        after: list[torch.Tensor] = []
        handles = [
            module.register_forward_hook(lambda module, inputs, output: after.append(_first(output)))
            for module in (model.decoder.layers[0], model.decoder.final_layernorm)
        ]
        is_padding = torch.zeros_like(self._tokens, dtype=torch.bool)
        model(*(values.to(device) for values in (self._tokens, self._modality, is_padding)))
        for handle in handles:
            handle.remove()
        of_layer, normed = (states.transpose(0, 1).float().cpu() for states in after)
        return of_layer, normed

    def head(self, start: int, rows: int) -> torch.Tensor:
        """``rows`` rows of the head, fp32."""
        return self._rows(HEAD if HEAD in self._reader.forms else EMBEDDING, start, rows)

    def _rows(self, key: str, start: int, rows: int) -> torch.Tensor:
        return self._reader.read(Region(key, (start, 0), (rows, self._reader.forms[key].shape[1]))).float()

    def _model_of(self, layer: int) -> MoSTModel:
        is_dense = layer < self._config.model.first_k_dense_replace
        if self._model is None or self._is_dense != is_dense:
            self._model, self._pieces = None, []  # free it before the next one is made
            [self._model] = build_model(self._config_of_one(is_dense))
            self._model.decoder.layers = self._model.decoder.layers[:1]
            self._pieces = list(_pieces(self._model))
            self._is_dense = is_dense
        for region, view in self._pieces:
            stored = dataclasses.replace(region, key=region.key.replace(f"{_LAYER}0.", f"{_LAYER}{layer}.", 1))
            view.copy_(self._reader.read(stored).view(view.shape))
        return self._model.eval()

    def _config_of_one(self, is_dense: bool) -> RunConfig:
        """The configuration of one layer, with as few ids and codes as there can be.

        A model needs a layer of experts: after a dense one comes a small one, which is not used.
        """
        values = dataclasses.asdict(self._config)
        further = [
            {"name": entry.name, "start": place, "stop": place + 1}
            for place, entry in enumerate(self._config.vocab.further_modalities)
        ]
        vocab = {"text_vocab_size": len(further) + 1, "num_codebooks": 1, "codebook_size": 1, "layout": "frame"}
        model = values["model"] | {
            "num_layers": 1 + is_dense,
            "first_k_dense_replace": int(is_dense),
            "codebook_loss_weights": [],
            "share_embeddings_and_output_weights": False,
            "transformer_impl": "portable",
        }
        model["moe"] |= PORTABLE
        if is_dense:
            small = {"moe_ffn_hidden_size": 1, "moe_shared_expert_intermediate_size": 0}
            model["moe"] |= small | {"moe_shared_expert_gate": False}
        sections: dict[str, Any] = {
            "vocab": {**vocab, "further_modalities": further},
            "model": model,
            "precision": {"dtype": "fp32"},
        }
        return build_config(self._name, sections)


@torch.no_grad()
def _pieces(model: MoSTModel) -> Iterator[tuple[Region, torch.Tensor]]:
    """(region, view of the model's memory) of the tensors of layer and final norm, as checkpoints have them."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = model.sharded_state_dict(metadata=metadata)
    apply_factories(state)
    for sharded in nested_values(state):
        if isinstance(sharded, ShardedTensor) and sharded.key.startswith((_LAYER, _NORM)):
            sizes = (*[1] * sharded.prepend_axis_num, *sharded.data.shape)
            yield Region(sharded.key, tuple(sharded.global_offset), sizes), sharded.data


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
