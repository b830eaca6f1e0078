"""Constrained decoding: text is text until its end id; audio consists of whole frames in codebook order.

A grammar is a finite automaton whose tables are on the device, so that a generation step does not involve the host. The
state of a row determines which ids are forbidden. The kind of the chosen id determines the next state.

Shape letters: b rows, V ids of the grammar, S states, U sets of forbidden ids, C codebooks.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from megatron_most.vocab import Modality, VocabLayout

_OTHER, _LEADING, _END = range(3)
"""Kinds of ids: those that begin a codec frame, the one that ends the segment, and all others."""
_KINDS = 3  # a state has one transition for each kind, in this order

DONE = 0
"""The state after the end, where only the end id may follow."""
_START = _KINDS


@dataclasses.dataclass(frozen=True)
class Grammar:
    """The tables of an automaton. The number of a state is the index of its first transition: 0, 3, 6, ...

    Args:
        ends: the ids that end the generated segment; they are not part of the result.
        ids: the ids that may be generated. A choice is an index into this range.
        forbidden: ``[U, V]`` bool.
        forbidden_in: ``[3 * S]``, at the number of each state, its row of ``forbidden``.
        kind_of: ``[V]``, the kind of each id.
        next_state: ``[3 * S]``, the state after each transition.
        has_no_code: ``[3 * S, C]`` bool, True for codebooks without a code at the id of a transition. None if ids have
            no codes beside them.
    """

    ends: tuple[int, ...]
    ids: range
    forbidden: torch.Tensor
    forbidden_in: torch.Tensor
    kind_of: torch.Tensor
    next_state: torch.Tensor
    has_no_code: torch.Tensor | None

    def to(self, device: torch.device) -> Grammar:
        return dataclasses.replace(
            self,
            forbidden=self.forbidden.to(device),
            forbidden_in=self.forbidden_in.to(device),
            kind_of=self.kind_of.to(device),
            next_state=self.next_state.to(device),
            has_no_code=None if self.has_no_code is None else self.has_no_code.to(device),
        )

    def start(self, num_rows: int) -> torch.Tensor:
        """The initial states ``[b]``."""
        return torch.full((num_rows,), _START, device=self.next_state.device)

    def forbidden_after(self, state: torch.Tensor) -> torch.Tensor:
        """States ``[b]`` -> ``[b, V]`` bool, True for forbidden ids."""
        return self.forbidden.index_select(0, self.forbidden_in.index_select(0, state))

    def advance(self, state: torch.Tensor, choice: torch.Tensor) -> torch.Tensor | None:
        """Update states ``[b]`` in place by choices ``[b]``; return ``[b, C]``, True for codebooks without a code."""
        transition = state + self.kind_of.index_select(0, choice)
        torch.index_select(self.next_state, 0, transition, out=state)
        return None if self.has_no_code is None else self.has_no_code.index_select(0, transition)


def text_grammar(
    vocab: VocabLayout, num_text_ids: int, ends: tuple[int, ...], forbidden: tuple[int, ...] = ()
) -> Grammar:
    """Text up to any of ``ends``.

    Args:
        num_text_ids: the tokenizer's number of ids; the model may have more.
        forbidden: the tokenizer's special ids, which never occur inside text; ``ends`` may be among them.
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
    """1 to ``max_frames`` codec frames in the order of the codec layout, then ``end_of_audio``."""
    return _SpeechTables(vocab, max_frames).grammar()


class _SpeechTables:
    """Enumerates the states of audio: a number of positions and a number of frames so far."""

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
        """For each kind of id: one of ``ids`` after which audio continues, or None, and the number of frames then."""
        leading = self.layout.leading_ids
        first, stop = max(ids.start, leading.start), min(ids.stop, leading.stop)
        leads = first if first < stop and num_frames < self.max_frames else None
        other = next((id_ for id_ in (ids.start, ids.stop - 1) if id_ in ids and id_ not in leading), None)
        return [(other, num_frames), (leads, num_frames + 1), (None, num_frames)]

    def _without_code(self, position: int, num_frames: int, id_: int | None) -> np.ndarray:
        """``[C]`` bool for ``id_`` at ``position``; ``num_frames`` includes the frame that ``id_`` begins, if any."""
        codebooks = np.arange(self.layout.num_codebooks)
        if id_ is None or not self.layout.holds_side_codes(id_):
            return np.ones_like(codebooks, dtype=bool)
        return ~self.layout.has_code(position, num_frames, codebooks)

    def _forbidden(self, ids: range, may_end: bool, may_lead: bool) -> int:
        """The row of the table ``forbidden``, added if it is new."""
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
