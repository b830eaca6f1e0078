"""A model behind the interface of lm-evaluation-harness (EleutherAI), for its whole catalogue of text tasks.

Importing this module registers the name ``most`` with the harness.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from megatron_most.config import ParallelConfig
from megatron_most.data.building.text_windows import text_document, windows
from megatron_most.evaluation.interface import Model, load_model
from megatron_most.inference import Decoding, Sampling

MAX_NEW = 256
"""Ids that an answer may have where a task sets no limit; the harness's own default for Hugging Face models."""


@register_model("most")
class MostLM(TemplateLM):
    """Text tasks on a checkpoint or a Hugging Face export.

    Softmaxes run over the ids that the tokenizer has. Contexts begin with the beginning of sequence, as in training;
    the harness's ``hf`` models do so with ``add_bos_token=True``.

    Args:
        checkpoint: as ``--checkpoint`` of ``most evaluate``.
        model: a loaded model instead.
        tensor_parallel, expert_parallel: under torchrun; every rank answers all requests with the others.
        harness: options that the harness passes to every model; not needed here.
    """

    backend = "causal"

    def __init__(
        self,
        checkpoint: str = "",
        tokenizer: str | None = None,
        batch_size: int | str = 32,
        tensor_parallel: int = 1,
        expert_parallel: int = 1,
        model: Model | None = None,
        **harness: Any,
    ) -> None:
        super().__init__()
        layout = ParallelConfig(
            tensor_model_parallel_size=int(tensor_parallel), expert_model_parallel_size=int(expert_parallel)
        )
        self.model = model or load_model(
            checkpoint, tokenizer, layout=layout, needs_codec=False, batch_size=int(batch_size)
        )

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.model.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        return self.model.context

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids = list(self.model.tokenizer.encode(string))
        return ids if add_special_tokens is False else [self.prefix_token_id, *ids]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        documents = []
        for _texts, context, continuation in requests:
            room = self.max_length + 1 - len(continuation)  # the last id predicts nothing and takes no position
            before = context[-room:] if room > 0 else context[-1:]
            documents.append(text_document(self.model.vocab, before, continuation[-self.max_length :]))
        found = self.model.loglikelihood(documents)
        return [(float(one.own.sum()), one.is_greedy) for one in found]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        documents, sizes = [], []
        for request in requests:
            ids = self.model.tokenizer.encode(request.args[0])
            cut = list(windows(self.model.vocab, ids, self.prefix_token_id, self.max_length))
            documents += cut
            sizes.append(len(cut))
        found = iter(self.model.loglikelihood(documents))
        return [sum(float(next(found).own.sum()) for _ in range(size)) for size in sizes]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        answers = [""] * len(requests)
        for options, places in _alike([request.args[1] for request in requests]):
            prompts = []
            for place in places:
                ids = self.tok_encode(requests[place].args[0])[-(self.max_length - options.max_new) :]
                prompts.append(text_document(self.model.vocab, ids, []))
            found = self.model.generate(prompts, Decoding(max_new=options.max_new, sampling=options.sampling))
            for place, answer in zip(places, found, strict=True):
                answers[place] = _until(answer.text or "", requests[place].args[1].get("until"))
        return answers


class _Options:
    """What decides about how an answer is generated, from the harness's names."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.max_new = int(given.get("max_gen_toks", given.get("max_new_tokens", MAX_NEW)))
        is_random = given.get("do_sample", True) and given.get("temperature", 0.0) > 0
        temperature = float(given.get("temperature", 0.0)) if is_random else 0.0
        self.sampling = Sampling(temperature, int(given.get("top_k", 0)), float(given.get("top_p", 1.0)))


def _alike(given: Sequence[dict[str, Any]]) -> list[tuple[_Options, list[int]]]:
    """Requests with the same options, by their places."""
    groups: dict[tuple[int, Sampling], tuple[_Options, list[int]]] = {}
    for place, one in enumerate(given):
        options = _Options(one)
        groups.setdefault((options.max_new, options.sampling), (options, []))[1].append(place)
    return list(groups.values())


def _until(text: str, ends: str | Sequence[str] | None) -> str:
    """``text`` up to the first of ``ends``."""
    for end in [ends] if isinstance(ends, str) else ends or []:
        text = text.split(end)[0] if end else text
    return text
