"""transformers' implementation of a foreign model, one layer at a time: a model of one layer, made anew for each.

Shape letters: b rows, s positions, n = b * s tokens, h hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_most.conversion import hf_format
from megatron_most.conversion.architecture import Architecture, ForeignModel
from megatron_most.conversion.architectures import BY_NAME
from megatron_most.conversion.hugging_face import HuggingFaceModel
from megatron_most.errors import CheckpointError

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_LAYER = "model.layers."
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_ROUTER = (".gate.weight", ".gate.e_score_correction_bias")


class Carried(torch.nn.Module):
    """Stands in for an embedding: whatever the ids are, gives the hidden states that were carried along."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self._hidden = hidden

    def forward(self, *ids: torch.Tensor, **named_ids: torch.Tensor | None) -> torch.Tensor:
        return self._hidden


@dataclass(frozen=True)
class ExpertSubset:
    """Some of the experts of a base, which with these alone is a smaller model of the same architecture.

    Args:
        experts: of every MoE layer, in the order that they have in the smaller model.
        top_k, n_group, topk_group: its routing, by the format's names.
    """

    experts: tuple[tuple[int, ...], ...]
    top_k: int
    n_group: int
    topk_group: int

    def config(self, architecture: Architecture) -> dict[str, Any]:
        """The fields of ``config.json`` that differ."""
        return architecture.write_routing(len(self.experts[0]), self.top_k, self.n_group, self.topk_group)

    def take(self, weights: dict[str, torch.Tensor], moe_layer: int) -> dict[str, torch.Tensor]:
        """The weights of a layer without those of other experts."""
        places = {expert: place for place, expert in enumerate(self.experts[moe_layer])}
        taken = {}
        for name, tensor in weights.items():
            if match := _EXPERT.search(name):
                place = places.get(int(match[1]))
                if place is not None:
                    taken[f"{name[: match.start(1)]}{place}{name[match.end(1) :]}"] = tensor
            else:
                taken[name] = tensor[list(places)] if name.endswith(_ROUTER) else tensor
        return taken


class ForeignLayers:
    """The layers of the model in a folder, in fp32. What code the folder brings along is not run.

    Args:
        tokens: ``[b, s]``, ids of the model.
        modality: ``[b, s]``, for the MoST format, whose routers depend on it.
        subset: leave out all other experts.
    """

    def __init__(
        self,
        source: HuggingFaceModel,
        foreign: ForeignModel,
        tokens: torch.Tensor,
        modality: torch.Tensor,
        subset: ExpertSubset | None = None,
    ) -> None:
        self._source, self._foreign, self._subset = source, foreign, subset
        self._tokens, self._modality = tokens, modality

    def embed(self) -> torch.Tensor:
        """``[b, s, h]``."""
        return rows_of(self._tokens, self._foreign.vocab_size, lambda start, rows: self._rows(EMBEDDING, start, rows))

    @torch.no_grad()
    def run(self, layer: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states ``[b, s, h]`` after a layer, and the final norm of them."""
        model = self._model_of(layer)
        model.set_input_embeddings(Carried(hidden))
        if self._foreign.choices:
            _choose_by_modality(model, self._foreign, self._modality.flatten())
        after: list[torch.Tensor] = []
        [module] = model.model.layers
        module.register_forward_hook(lambda module, inputs, output: after.append(_first(output)))
        normed = model.model(self._tokens, use_cache=False).last_hidden_state
        for parameter in model.parameters():
            parameter.data = torch.empty(0)  # free it now: modules may be parts of cycles, which are collected later
        return after[0], normed

    def head(self, start: int, rows: int) -> torch.Tensor:
        """``rows`` rows of the head, fp32."""
        return self._rows(EMBEDDING if self._foreign.tied else HEAD, start, rows)

    def _rows(self, name: str, start: int, rows: int) -> torch.Tensor:
        return self._source.read(name, start, rows).float()

    def _model_of(self, layer: int) -> Any:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        kind, config = self._class_and_config(layer)
        prefix = f"{_LAYER}{layer}."
        weights = {
            f"{_LAYER}0.{name.removeprefix(prefix)}": self._source.read(name)
            for name in self._source.tensors
            if name.startswith(prefix)
        }
        dense = self._foreign.model.get("first_k_dense_replace", 0)
        if self._subset is not None and layer >= dense:
            weights = self._subset.take(weights, layer - dense)
        weights[NORM] = self._source.read(NORM)
        model, found = kind.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
        wrong = [name for name in found["missing_keys"] if name.startswith(_LAYER) or name == NORM]
        if wrong or found["mismatched_keys"]:
            name = sorted([*wrong, *found["mismatched_keys"]], key=str)[0]
            raise CheckpointError(f"{self._source.directory}: layer {layer}: transformers finds no weights for {name}")
        # Frequencies are not weights: transformers leaves them unset if torch's tensor factories have stand-ins.
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        return model.eval()

    def _class_and_config(self, layer: int) -> tuple[Any, Any]:
        """The class and the configuration of a model that consists of one layer, and of hardly any ids and codes."""
        import transformers

        architecture = BY_NAME[self._foreign.architecture]
        values = {
            key: value for key, value in self._source.config.items() if key not in ("model_type", "architectures")
        }
        if self._subset is not None:
            values.pop(architecture.num_experts.also or "", None)  # the other name of a field that is replaced
            values |= self._subset.config(architecture)
        if architecture.name == hf_format.NAME:
            from megatron_most.huggingface import MoSTConfig, MoSTForConditionalGeneration

            kind, config = MoSTForConditionalGeneration, MoSTConfig(**values)
            config.codebook_vocab_size = 1
        else:
            name = architecture.transformers_class
            kind = getattr(transformers, f"{name}ForCausalLM")
            config = getattr(transformers, f"{name}Config")(**values)
        if hasattr(config, "first_k_dense_replace"):
            config.first_k_dense_replace = int(layer < config.first_k_dense_replace)
        if hasattr(config, "mlp_only_layers"):
            config.mlp_only_layers = [0] if layer in config.mlp_only_layers else []
        config.num_hidden_layers = config.vocab_size = 1
        config.pad_token_id = None
        config.tie_word_embeddings = False
        return kind, config


def rows_of(tokens: torch.Tensor, num_rows: int, read: Any, at_once: int = 1 << 13) -> torch.Tensor:
    """``[b, s, h]``: the rows of a table that ``tokens [b, s]`` name, read in blocks: ``read(start, rows)``."""
    found: torch.Tensor | None = None
    for start, rows in blocks(0, num_rows, at_once):
        here = (tokens >= start) & (tokens < start + rows)
        if here.any():
            block = read(start, rows)
            found = block.new_empty(*tokens.shape, block.shape[-1]) if found is None else found
            found[here] = block[tokens[here] - start]
    assert found is not None, "tokens are rows of the table"
    return found


def blocks(first: int, count: int, at_once: int) -> Iterator[tuple[int, int]]:
    """(start, number) of blocks of at most ``at_once`` rows."""
    for start in range(first, first + count, at_once):
        yield start, min(at_once, first + count - start)


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _choose_by_modality(model: Any, foreign: ForeignModel, modality: torch.Tensor) -> None:
    """Replace DeepSeek-V2's routers by MoST's (arXiv 2601.10272): softmax over all experts, scores of the other group
    set to zero, top-k without normalization."""
    allowed = torch.zeros(len(foreign.choices), foreign.num_experts, dtype=torch.bool)
    for index, experts in enumerate(foreign.choices):
        allowed[index, list(experts)] = True

    def forward(gate: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = torch.nn.functional.linear(hidden.flatten(0, -2).float(), gate.weight.float())
        scores = logits.softmax(dim=-1).masked_fill(~allowed[modality], 0.0)
        weights, experts = scores.topk(foreign.top_k, dim=-1)
        return logits, weights * gate.routed_scaling_factor, experts

    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            gate = layer.mlp.gate
            gate.forward = lambda hidden, gate=gate: forward(gate, hidden)
