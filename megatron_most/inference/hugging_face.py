"""Generation from a Hugging Face export, behind the interface of the native generator.

Shape letters: b prompts, s positions, C codebooks, F codec frames, V ids, K codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_most import parallel, platform
from megatron_most.audio import AudioCodec, load_codec
from megatron_most.config import ParallelConfig
from megatron_most.conversion import hf_format
from megatron_most.conversion.hugging_face import CONFIG, HuggingFaceModel
from megatron_most.errors import CheckpointError, ConfigError
from megatron_most.extras import require
from megatron_most.inference.generator import Prompt, left_padded
from megatron_most.inference.loading import LoadedModel, no_codec
from megatron_most.inference.sampling import Sampling
from megatron_most.text import load_tokenizer
from megatron_most.text.stop_ids import stop_ids
from megatron_most.vocab import VocabLayout


def is_export(path: str | Path) -> bool:
    """Whether this is a Hugging Face folder rather than a checkpoint or a run directory."""
    return (Path(path) / CONFIG).is_file()


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
        ConfigError: there is no tokenizer or no codec.
    """
    require("transformers", "safetensors")
    folder = Path(folder)
    source = HuggingFaceModel(folder)
    kind = source.config.get("model_type")
    if kind != hf_format.MODEL_TYPE:
        raise CheckpointError(f"{folder / CONFIG}: model_type={kind!r}: must be {hf_format.MODEL_TYPE!r}")
    trained = hf_format.run_config(source, [])
    text_tokenizer = load_tokenizer(tokenizer or folder)
    from megatron_most.huggingface import MoSTForConditionalGeneration

    platform.install()
    parallel.initialize(ParallelConfig(), trained.seed)
    model = MoSTForConditionalGeneration.from_pretrained(folder, dtype="auto", local_files_only=True)
    return LoadedModel(
        HuggingFaceGenerator(model.to(platform.device()), trained.vocab),  # type: ignore[arg-type]  # wrapped by transformers
        text_tokenizer,
        _codec(folder, source.config.get("codec"), codec) if needs_codec else no_codec(str(folder)),
        trained,
        None,
        stop_ids(tokenizer or folder, text_tokenizer),
    )


def _codec(folder: Path, stored: Any, given: str | None) -> AudioCodec:
    known = stored if isinstance(stored, dict) else {}
    name = given or known.get("name")
    if name is None:
        raise ConfigError(f"{folder}: has no codec; pass one with --codec")
    codec, fingerprint = load_codec(name), known.get("fingerprint")
    if fingerprint is not None and codec.fingerprint != fingerprint:
        raise CheckpointError(
            f"{folder}: belongs to another codec: {known.get('name')} ({fingerprint[:12]}) in {CONFIG},"
            f" {name} ({codec.fingerprint[:12]}) given"
        )
    return codec


class HuggingFaceGenerator:
    """As :class:`~megatron_most.inference.generator.Generator`, by the exported model. It must be on one device."""

    def __init__(self, model: Any, vocab: VocabLayout) -> None:
        self.model, self.vocab = model.eval(), vocab

    @torch.inference_mode()
    def logits(
        self, ids: torch.Tensor, codes: torch.Tensor, is_padding: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        inputs = self._inputs(ids, codes, is_padding)
        outputs = self.model(**inputs, use_cache=False)
        return outputs.logits.float(), None if outputs.code_logits is None else outputs.code_logits.float()

    def text(
        self,
        prompts: Sequence[Prompt],
        end: int | Sequence[int],
        max_new: int | Sequence[int],
        sampling: Sampling,
        *,
        num_text_ids: int | None = None,
        forbidden: tuple[int, ...] = (),
    ) -> list[list[int]]:
        ends = [end] if isinstance(end, int) else list(end)
        limits = [max_new] * len(prompts) if isinstance(max_new, int) else list(max_new)
        beyond = range(num_text_ids or self.vocab.text_vocab_size, self.vocab.text_vocab_size)
        options: dict[str, Any] = {
            "eos_token_id": ends,
            "pad_token_id": ends[0],
            "suppress_tokens": sorted({*forbidden, *beyond} - set(ends)) or None,
            "do_sample": sampling.is_random,
        }
        if sampling.is_random:
            options |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        rows: list[list[int]] = []
        for group, seed in self._groups(prompts, sampling):
            inputs = self._inputs(*left_padded(group, self.vocab))
            with torch.random.fork_rng(enabled=sampling.is_random):
                if seed is not None:
                    torch.manual_seed(seed)
                made = self.model.generate(**inputs, **options, max_new_tokens=max(limits))
            rows += made[:, inputs["input_ids"].shape[1] :].tolist()
        return [_until(row, ends)[:limit] for row, limit in zip(rows, limits, strict=True)]

    def speech(self, prompts: Sequence[Prompt], max_frames: int, sampling: Sampling) -> list[np.ndarray]:
        choices = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        spoken: list[np.ndarray] = []
        for group, seed in self._groups(prompts, sampling):
            inputs = self._inputs(*left_padded(group, self.vocab))
            spoken += self.model.generate_speech(**inputs, max_frames=max_frames, **choices, seed=seed or 0)
        return spoken

    def _groups(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[tuple[Sequence[Prompt], int | None]]:
        """Prompts that are continued together, and the seed. Random draws of a batch would depend on all its rows."""
        if not sampling.is_random:
            return [(prompts, None)]
        device = torch.device("cpu")
        return [
            ([one], sampling.generator(device, np.asarray(one.ids).tobytes()).initial_seed() % (1 << 63))
            for one in prompts
        ]

    def _inputs(self, ids: torch.Tensor, codes: torch.Tensor, is_padding: torch.Tensor) -> dict[str, Any]:
        device = self.model.device
        visible = codes.to(device) if self.vocab.codec_layout.uses_side_codes else None
        return {"input_ids": ids.to(device), "codes": visible, "attention_mask": (~is_padding).long().to(device)}


def _until(row: list[int], ends: Sequence[int]) -> list[int]:
    """``row`` up to the first of ``ends``."""
    return row[: next((place for place, token in enumerate(row) if token in ends), len(row))]
