"""Constrained generation: text stays text until its end, speech stays whole codec frames in the layout's order.

Shape letters: b rows, s prompt positions, C codebooks, K values of a code, F codec frames, V ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DynamicCache, GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from .codec_layout_most import NO_CODE, CodecLayout
from .configuration_most import MoSTConfig

if TYPE_CHECKING:
    from .processing_most import MoSTProcessor


class TextLogitsProcessor(LogitsProcessor):
    """Forbids every id that is no text, or that the tokenizer cannot decode."""

    def __init__(self, config: MoSTConfig) -> None:
        self.config = config

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return text_alone(self.config, scores)


def text_alone(config: MoSTConfig, logits: torch.Tensor) -> torch.Tensor:
    """``logits [..., V]`` with -inf at every id that is no text, or that the tokenizer cannot decode."""
    ids = torch.arange(logits.shape[-1], device=logits.device)
    is_forbidden = (ids >= (config.num_text_ids or config.text_vocab_size)) | (config.modality_of(ids) != 0)
    return logits.masked_fill(is_forbidden, float("-inf"))


class SpeechState:
    """What may follow in one row: 1 to ``max_frames`` frames as ``layout`` orders them, then ``end_id``.

    A segment that goes on and one that ends with the frame that began last share their positions up to the first where
    the next frame would begin. There the choice is made; after it, the layout says all that follows.
    """

    def __init__(self, layout: CodecLayout, end_id: int, max_frames: int) -> None:
        if max_frames < 1:
            raise ValueError(f"max_frames={max_frames}: must be at least 1")
        self.layout, self.end_id = layout, end_id
        self.position = self.num_frames = 0
        self.is_done = False
        self._growing = layout.symbols(max_frames)
        self._ending: np.ndarray | None = None  # symbols of the whole segment, once it is known to end

    def allowed(self) -> list[range]:
        """Runs of ids that may come next."""
        if self.is_done:
            return [range(self.end_id, self.end_id + 1)]
        if self._ending is not None:
            return [self._ids_at(self._ending)]
        grows = self._ids_at(self._growing)
        if self.num_frames == 0 or grows != self.layout.ids_of(0):
            return [grows]
        return [grows, self._ids_at(self.layout.symbols(self.num_frames))]

    def advance(self, id_: int) -> np.ndarray:
        """Take ``id_``, one of those allowed; returns ``[C]`` bool, the codebooks that have a side code beside it."""
        if self.is_done or id_ == self.end_id:
            self.is_done = True
            return np.zeros(self.layout.num_codebooks, dtype=bool)
        if self._ending is None and id_ not in self._ids_at(self._growing):
            self._ending = self.layout.symbols(self.num_frames)
        self.num_frames += id_ in self.layout.ids_of(0)
        has_code = self.layout.has_code(self.position, self.num_frames)
        self.position += 1
        return has_code & self.layout.uses_side_codes

    def _ids_at(self, symbols: np.ndarray) -> range:
        """The ids at this position of a segment; the end behind it."""
        if self.position == len(symbols):
            return range(self.end_id, self.end_id + 1)
        return self.layout.ids_of(int(symbols[self.position]))


class Sampler:
    """Greedy at ``temperature`` 0; otherwise top-k (0: off), then top-p (1: off) sampling from seeded noise."""

    def __init__(
        self, device: torch.device, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0
    ) -> None:
        if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
            raise ValueError(
                f"temperature={temperature}, top_k={top_k}: must not be negative; top_p={top_p}: must be in (0, 1]"
            )
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self._random = torch.Generator(device).manual_seed(seed)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """``logits [..., n]`` (-inf forbids a choice) -> indices ``[...]``."""
        logits = logits.float()
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        logits = logits / self.temperature
        if self.top_k:
            kth = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < kth, float("-inf"))
        probs = logits.softmax(dim=-1)
        if self.top_p < 1:
            ordered, order = probs.sort(dim=-1, descending=True)
            is_beyond = ordered.cumsum(dim=-1) - ordered >= self.top_p
            probs = probs.masked_fill(is_beyond.scatter(-1, order, is_beyond), 0.0)
        chosen = torch.multinomial(probs.flatten(0, -2), 1, generator=self._random)
        return chosen.view(probs.shape[:-1])


class SpeechGeneration(PreTrainedModel, GenerationMixin):
    """Text and speech from prompts, for a model whose ``forward`` takes codes and returns logits of both."""

    config: MoSTConfig

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: Any = None,
        logits_processor: LogitsProcessorList | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """transformers' ``generate``, for text: no other id is ever chosen. Prompts may hold ``codes [b, s, C]``."""
        processors = LogitsProcessorList([TextLogitsProcessor(self.config), *(logits_processor or [])])
        # transformers declares self to be of a class that no model is of.
        return super().generate(inputs, generation_config, processors, *args, **kwargs)  # type: ignore[misc]

    @torch.no_grad()
    def generate_speech(
        self,
        input_ids: torch.Tensor,
        codes: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        max_frames: int = 1024,
        **sampling: Any,
    ) -> list[np.ndarray]:
        """Codes ``[F, C]`` for each prompt that ends in ``begin_of_audio``; 1 to ``max_frames`` frames.

        Args:
            input_ids, codes, attention_mask: of left-padded prompts, as :class:`MoSTProcessor` makes them.
            sampling: ``temperature``, ``top_k``, ``top_p`` and ``seed``; greedy by default.
        """
        config = self.config
        layout = CodecLayout(config.codec_layout, config.frame_id, config.num_codebooks, config.codebook_size)
        sampler = Sampler(input_ids.device, **sampling)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        states = [SpeechState(layout, config.end_of_audio_id, max_frames) for _ in input_ids]
        ids: list[list[int]] = [[] for _ in states]
        side_codes: list[list[np.ndarray]] = [[] for _ in states]
        cache = DynamicCache(config=config)
        while not all(state.is_done for state in states):
            outputs = self(input_ids, codes, mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
            choice = sampler(self._masked(outputs.logits[:, -1], states)).tolist()
            has_code = np.stack([state.advance(id_) for state, id_ in zip(states, choice, strict=True)])
            input_ids = torch.tensor(choice, device=mask.device)[:, None]
            if layout.uses_side_codes:
                chosen = sampler(outputs.code_logits[:, -1, :, : config.codebook_size])
                is_absent = torch.from_numpy(~has_code).to(mask.device)
                codes = chosen.masked_fill(is_absent, NO_CODE)[:, None]
            new_codes = None if codes is None else codes[:, -1].cpu().numpy()
            for row, state in enumerate(states):
                if not state.is_done:
                    ids[row].append(choice[row])
                    if new_codes is not None:
                        side_codes[row].append(new_codes[row])
            is_going_on = torch.tensor([not state.is_done for state in states], device=mask.device)
            mask = torch.cat([mask, is_going_on[:, None].to(mask.dtype)], dim=1)
        return [
            layout.decode(np.array(row), np.stack(beside) if layout.uses_side_codes else None)
            for row, beside in zip(ids, side_codes, strict=True)
        ]

    def transcribe(
        self, processor: MoSTProcessor, codes: Sequence[np.ndarray], max_new_tokens: int = 256, **generation: Any
    ) -> list[str]:
        """Text of each utterance, given as codec codes ``[F, C]``; ``generation`` goes to :meth:`generate`."""
        inputs = processor.transcription_prompts(codes).to(self.device)
        return self._texts(processor, inputs, max_new_tokens=max_new_tokens, **generation)

    def speak(
        self, processor: MoSTProcessor, texts: Sequence[str], max_frames: int = 1024, **sampling: Any
    ) -> list[np.ndarray]:
        """Codec codes ``[F, C]`` of each text, spoken; see :meth:`generate_speech`."""
        inputs = processor.speech_prompts(texts).to(self.device)
        return self.generate_speech(**inputs, max_frames=max_frames, **sampling)

    def chat(
        self, processor: MoSTProcessor, turns: Sequence[dict[str, Any]], answer: str = "written", **options: Any
    ) -> str | np.ndarray:
        """The assistant's next turn: text, or codec codes ``[F, C]`` where ``answer`` is ``spoken``.

        Args:
            turns: ``{"role": ..., "content": text}`` or ``{"role": ..., "codes": [F, C]}``, the user's last; roles are
                ``system``, ``user`` and ``assistant``.
            options: of :meth:`generate`, or of :meth:`generate_speech`.
        """
        inputs = processor.chat_prompts([turns], answer).to(self.device)
        if answer == "spoken":
            return self.generate_speech(**inputs, **options)[0]
        return self._texts(processor, inputs, **{"max_new_tokens": 256, **options})[0]

    def _texts(self, processor: MoSTProcessor, inputs: Any, **generation: Any) -> list[str]:
        # Greedy without a temperature, whatever generation_config.json of a base model says.
        options = {"do_sample": bool(generation.get("temperature")), **generation}
        generated = self.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        texts = processor.batch_decode(generated, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [text.strip() for text in texts]

    def _masked(self, logits: torch.Tensor, states: Sequence[SpeechState]) -> torch.Tensor:
        """``logits [b, V]`` with -inf at every id that may not come next."""
        is_allowed = torch.zeros_like(logits, dtype=torch.bool)
        for row, state in zip(is_allowed, states, strict=True):
            for ids in state.allowed():
                row[ids.start : ids.stop] = True
        return logits.masked_fill(~is_allowed, float("-inf"))
