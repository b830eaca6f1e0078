"""Generation from a Hugging Face export, behind the interface of the native generator.

Shape letters: b prompts, s positions, C codebooks, V ids, K codes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_most import parallel, platform
from megatron_most.audio import AudioCodec, load_codec
from megatron_most.config import ParallelConfig
from megatron_most.conversion import hf_format
from megatron_most.conversion.hugging_face import CONFIG, HuggingFaceModel
from megatron_most.errors import CheckpointError
from megatron_most.extras import require
from megatron_most.inference.generator import Generator
from megatron_most.inference.loading import LoadedModel, MissingCodec, no_codec
from megatron_most.inference.past import Logits, Past
from megatron_most.text import load_tokenizer
from megatron_most.text.stop_ids import stop_ids
from megatron_most.vocab import VocabLayout


def load_export(
    folder: str | Path, tokenizer: str | None = None, codec: str | None = None, *, needs_codec: bool = True
) -> LoadedModel:
    """Load what ``most convert export --format hf`` wrote, in the element type of its weights, onto this process.

    The code in the folder is not run: it is a copy of this package's.

    Args:
        tokenizer, codec: where they are, if not in the folder and where its configuration says.
        needs_codec: False for text alone: then no codec is loaded.

    Raises:
        CheckpointError: the folder holds another format, is damaged, or belongs to another codec.
        ConfigError: there is no tokenizer.
        MissingCodec: there is no codec.
    """
    require("transformers", "safetensors")
    folder = Path(folder)
    source = HuggingFaceModel(folder)
    kind = source.config.get("model_type")
    if kind != hf_format.MODEL_TYPE:
        raise CheckpointError(f"{folder / CONFIG}: model_type={kind!r}: must be {hf_format.MODEL_TYPE!r}")
    trained = hf_format.run_config(source, [])
    text_tokenizer = load_tokenizer(tokenizer or folder)
    its_codec = _codec(folder, source.config.get("codec"), codec) if needs_codec else no_codec(str(folder))
    from megatron_most.huggingface import MoSTForConditionalGeneration

    platform.install()
    parallel.initialize(ParallelConfig(), trained.seed)
    model = MoSTForConditionalGeneration.from_pretrained(folder, dtype="auto", local_files_only=True)
    return LoadedModel(
        HuggingFaceGenerator(model.to(platform.device()), trained.vocab),  # type: ignore[arg-type]  # wrapped by transformers
        text_tokenizer,
        its_codec,
        trained,
        None,
        stop_ids(tokenizer or folder, text_tokenizer),
    )


def _codec(folder: Path, stored: Any, given: str | None) -> AudioCodec:
    known = stored if isinstance(stored, dict) else {}
    name = given or known.get("name")
    if name is None:
        raise MissingCodec(str(folder))
    codec, fingerprint = load_codec(name), known.get("fingerprint")
    if fingerprint is not None and codec.fingerprint != fingerprint:
        raise CheckpointError(
            f"{folder}: belongs to another codec: {known.get('name')} ({fingerprint[:12]}) in {CONFIG},"
            f" {name} ({codec.fingerprint[:12]}) given"
        )
    return codec


class HuggingFaceGenerator(Generator):
    """As :class:`~megatron_most.inference.generator.Generator`, by the exported model. It must be on one device."""

    def __init__(self, model: Any, vocab: VocabLayout) -> None:
        self.model = model.eval()
        self._prepare(vocab, model.device, model.config.max_position_embeddings)

    @torch.inference_mode()
    def logits(
        self, ids: torch.Tensor, codes: torch.Tensor, is_padding: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        visible = codes.to(self.device) if self.vocab.codec_layout.uses_side_codes else None
        mask = (~is_padding).long().to(self.device)
        outputs = self.model(input_ids=ids.to(self.device), codes=visible, attention_mask=mask, use_cache=False)
        return outputs.logits.float(), None if outputs.code_logits is None else outputs.code_logits.float()

    def _past(self, logit_ids: range, num_rows: int, num_positions: int) -> Past:
        return ExportPast(self.model, logit_ids)


class ExportPast:
    """The past of an exported model, in the cache of ``transformers``."""

    def __init__(self, model: Any, logit_ids: range) -> None:
        self._model, self._logit_ids = model, logit_ids
        self.position = torch.zeros(1, dtype=torch.long, device=model.device)

    def read_prompt(self, ids: torch.Tensor, codes: torch.Tensor, is_padding: torch.Tensor) -> Logits:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config)
        self._mask = ids.new_zeros(len(ids), 0)
        self.position.zero_()
        return self.read_next(ids, codes, is_padding)

    def read_next(self, ids: torch.Tensor, codes: torch.Tensor | None, is_padding: torch.Tensor) -> Logits:
        self._mask = torch.cat([self._mask, (~is_padding).long()], dim=1)
        outputs = self._model(
            input_ids=ids,
            codes=codes,
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.position += ids.shape[1]
        logits = outputs.logits[..., self._logit_ids.start : self._logit_ids.stop].float()
        return logits, None if outputs.code_logits is None else outputs.code_logits.float()
