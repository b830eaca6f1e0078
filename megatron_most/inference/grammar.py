"""What may come next: text stays text until its end token; audio stays whole frames in codebook order.

A grammar is an automaton whose tables lie on the device, so that a step of generation never waits for the host: the
state of a row says which ids are forbidden, and the kind of the id that was chosen leads to the next state.

Shape letters: b rows, V ids that the grammar knows, S states, U sets of forbidden ids, C codebooks.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from megatron_most.vocab import Modality, VocabLayout

_OTHER, _LEADING, _END = range(3)
"""Kinds of ids: most of them, those that begin a codec frame, and the one that ends the segment."""
_KINDS = 3  # for each state, transitions of these kinds in this order

DONE = 0
"""The state after the end: nothing but the end may follow."""
_START = _KINDS


@dataclasses.dataclass(frozen=True)
class Grammar:
    """The tables. A state is numbered by its first transition, of which it has one for each kind of id.

    Args:
        ends: the ids that end the generated segment; they are not part of the result.
        ids: the ids that may ever be chosen. A choice is a place in this range.
        forbidden: ``[U, V]`` bool.
        forbidden_in: ``[3 * S]``, for each state which row of ``forbidden`` holds; unused between states.
        kind_of: ``[V]``.
        next_state: ``[3 * S]``, where each transition leads.
        has_no_code: ``[3 * S, C]`` bool, the codebooks without a code at the id of a transition; None where ids carry
            no codes.
    """

    ends: tuple[int, ...]
    ids: range
    forbidden: torch.Tensor
    forbidden_in: torch.Tensor
    kind_of: torch.Tensor
    next_state: torch.Tensor
    has_no_code: torch.Tensor | None

    def to(self, device: torch.device) -> Grammar:
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **tensors)

    def start(self, num_rows: int) -> torch.Tensor:
        """States ``[b]`` before anything is generated."""
        return torch.full((num_rows,), _START, device=self.next_state.device)

    def forbidden_after(self, state: torch.Tensor) -> torch.Tensor:
        """States ``[b]`` -> ``[b, V]`` bool."""
        return self.forbidden.index_select(0, self.forbidden_in.index_select(0, state))

    def advance(self, state: torch.Tensor, choice: torch.Tensor) -> torch.Tensor | None:
        """Move states ``[b]`` on, in place, by choices ``[b]``; returns ``[b, C]``, which codebooks have no code."""
        transition = state + self.kind_of.index_select(0, choice)
        torch.index_select(self.next_state, 0, transition, out=state)
        return None if self.has_no_code is None else self.has_no_code.index_select(0, transition)


def text_grammar(
    vocab: VocabLayout, num_text_ids: int, ends: tuple[int, ...], forbidden: tuple[int, ...] = ()
) -> Grammar:
    """Text that any of ``ends`` ends; ``forbidden`` are the tokenizer's markers that never occur inside text.

    num_text_ids: the tokenizer's; the model may have more, which no tokenizer could turn into text.
    """
    ids = torch.arange(num_text_ids)
    is_forbidden = vocab.modality_of(ids) != Modality.TEXT
    is_forbidden[[marker for marker in forbidden if marker not in ends]] = True
    is_end = torch.isin(ids, torch.tensor(ends))
    kind_of = torch.where(is_end, _END, _OTHER)
    return Grammar(
        ends=ends,
        ids=range(num_text_ids),
        forbidden=torch.stack([~is_end, is_forbidden]),
        forbidden_in=torch.tensor([0, 0, 0, 1, 1, 1]),
        kind_of=kind_of,
        next_state=torch.tensor([DONE, DONE, DONE, _START, DONE, DONE]),
        has_no_code=None,
    )


def speech_grammar(vocab: VocabLayout, max_frames: int) -> Grammar:
    """Codec positions as the layout orders them, 1 to ``max_frames`` frames, ended by ``end_of_audio``."""
    return _SpeechTables(vocab, max_frames).grammar()


class _SpeechTables:
    """Every state that audio can be in: how many positions and how many frames there are."""

    def __init__(self, vocab: VocabLayout, max_frames: int) -> None:
        self.layout = vocab.codec_layout
        self.max_frames = max_frames
        self.end = vocab.end_of_audio
        self.ids = range(vocab.text_vocab_size, vocab.size)
        self.forbidden = [self._all_but(range(0), may_end=True)]
        self._forbidden_of: dict[tuple[range, bool, bool], int] = {}
        self._state_of = {(0, 0): _START}

    def grammar(self) -> Grammar:
        forbidden_in, next_state = [0] * _KINDS, [DONE] * _KINDS
        has_no_code = [self._without_code(0, 0, None)] * _KINDS
        states = list(self._state_of)
        for position, num_frames in states:
            ids, may_end = self.layout.allowed_next(position, num_frames)
            forbidden_in += [self._forbidden(ids, may_end, may_lead=num_frames < self.max_frames)] * _KINDS
            for chosen, frames in self._continuations(ids, num_frames):
                following = (position + 1, frames)
                if chosen is not None and following not in self._state_of:
                    states.append(following)
                    self._state_of[following] = _KINDS * len(states)
                next_state.append(DONE if chosen is None else self._state_of[following])
                has_no_code.append(self._without_code(position, frames, chosen))
        kind_of = torch.full((len(self.ids),), _OTHER)
        kind_of[self._places(self.layout.leading_ids)] = _LEADING
        kind_of[self.end - self.ids.start] = _END
        return Grammar(
            ends=(self.end,),
            ids=self.ids,
            forbidden=torch.stack(self.forbidden),
            forbidden_in=torch.tensor(forbidden_in),
            kind_of=kind_of,
            next_state=torch.tensor(next_state),
            has_no_code=torch.from_numpy(np.stack(has_no_code)) if self.layout.uses_side_codes else None,
        )

    def _continuations(self, ids: range, num_frames: int) -> list[tuple[int | None, int]]:
        """For each kind, one of ``ids`` that is of it and goes on (None: there is none), and the frames with it."""
        leading = self.layout.leading_ids
        first, stop = max(ids.start, leading.start), min(ids.stop, leading.stop)
        leads = first if first < stop and num_frames < self.max_frames else None
        other = next((id_ for id_ in (ids.start, ids.stop - 1) if id_ in ids and id_ not in leading), None)
        return [(other, num_frames), (leads, num_frames + 1), (None, num_frames)]

    def _without_code(self, position: int, num_frames: int, id_: int | None) -> np.ndarray:
        """``[C]`` bool; ``num_frames`` with the one that ``id_`` at ``position`` may begin."""
        codebooks = np.arange(self.layout.num_codebooks)
        if id_ is None or not self.layout.holds_side_codes(id_):
            return np.ones_like(codebooks, dtype=bool)
        return ~self.layout.has_code(position, num_frames, codebooks)

    def _forbidden(self, ids: range, may_end: bool, may_lead: bool) -> int:
        """The row of the table."""
        key = (ids, may_end, may_lead)
        if key not in self._forbidden_of:
            self._forbidden_of[key] = len(self.forbidden)
            mask = self._all_but(ids, may_end)
            if not may_lead:
                mask[self._places(self.layout.leading_ids)] = True
            self.forbidden.append(mask)
        return self._forbidden_of[key]

    def _all_but(self, ids: range, may_end: bool) -> torch.Tensor:
        mask = torch.ones(len(self.ids), dtype=torch.bool)
        mask[self._places(ids)] = False
        mask[self.end - self.ids.start] = not may_end
        return mask

    def _places(self, ids: range) -> slice:
        return slice(max(ids.start - self.ids.start, 0), max(ids.stop - self.ids.start, 0))
