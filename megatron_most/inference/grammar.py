"""Constrained decoding: text is text until its end id; audio consists of whole frames in codebook order.

A grammar is a finite automaton whose tables are on the device, so that a generation step does not involve the host. The
state of a row determines which ids are forbidden. The kind of the chosen id determines the next state.

Shape letters: b rows, V ids of the grammar, S states, U sets of forbidden ids, C codebooks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch

from megatron_most.vocab import Modality, VocabLayout

_OTHER, _LEADING, _END, _SWITCH = range(4)
"""Kinds of ids: those that begin a codec frame, end the answer, or stand between text and audio; and all others."""
_KINDS = 4  # a state has one transition for each kind, in this order

DONE = 0
"""The state after the end, where only an end id may follow."""
_START = _KINDS


@dataclasses.dataclass(frozen=True)
class Grammar:
    """The tables of an automaton. The number of a state is the index of its first transition: 0, 4, 8, ...

    Args:
        ends: the ids that end what is generated; they are not part of the result.
        ids: the ids that may be generated. A choice is an index into this range.
        forbidden: ``[U, V]`` bool.
        forbidden_in: ``[4 * S]``, at the number of each state, its row of ``forbidden``.
        kind_of: ``[V]``, the kind of each id.
        next_state: ``[4 * S]``, the state after each transition.
        has_no_code: ``[4 * S, C]`` bool, True for codebooks without a code at the id of a transition. None if ids have
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
    tables = _Tables(vocab, range(num_text_ids), ends)
    words = tables.words(num_text_ids, forbidden)
    tables.build(_TEXT, lambda state: _State((words, *tables.ends), (_TEXT, None, None, None)))
    return tables.grammar(has_codes=False)


def speech_grammar(vocab: VocabLayout, max_frames: int, num_before: int = 0) -> Grammar:
    """Codec frames in the order of the codec layout, then ``end_of_audio``.

    Args:
        max_frames: the maximum number of frames.
        num_before: frames that the prompt ends with, laid out by ``CodecLayout.encode_open``. Without any there is at
            least one new frame.
    """
    tables = _Tables(vocab, range(vocab.text_vocab_size, vocab.size), (vocab.end_of_audio,))
    tables.build(
        _audio_start(vocab, num_before), lambda state: tables.audio(state, num_before + max_frames, tables.ends, None)
    )
    return tables.grammar(has_codes=vocab.codec_layout.uses_side_codes)


def mixed_grammar(
    vocab: VocabLayout,
    num_text_ids: int,
    ends: tuple[int, ...],
    forbidden: tuple[int, ...],
    max_new: int | None,
    max_frames: int,
    alternates: bool = False,
) -> Grammar:
    """Text or audio, as the model chooses, up to any of ``ends``.

    Args:
        num_text_ids, forbidden: as for text.
        max_new: the maximum number of ids of a text; None: any number.
        max_frames: the maximum number of frames of a segment of audio.
        alternates: texts and segments of audio may follow each other; else there is one text or one segment.
    """
    tables = _Tables(vocab, range(vocab.size), ends)
    words = tables.words(num_text_ids, forbidden)
    begins = (range(vocab.begin_of_audio, vocab.begin_of_audio + 1),)
    stops = (range(vocab.end_of_audio, vocab.end_of_audio + 1),)

    def describe(state: _Key) -> _State:
        if state == _FINISHED:
            return _State(tables.ends, (None,) * _KINDS)
        if state[0] == "audio":
            return tables.audio(state, max_frames, stops, _TEXT if alternates else _FINISHED)
        length = state[1]
        may_begin = alternates or state == _TEXT
        is_full = length == max_new
        following = None if is_full else ("text", length if max_new is None and length else length + 1)
        allowed = (() if is_full else (words,)) + tables.ends + (begins if may_begin else ())
        return _State(allowed, (following, None, None, _audio_start(vocab, 0) if may_begin else None))

    tables.build(_TEXT, describe)
    return tables.grammar(has_codes=vocab.codec_layout.uses_side_codes)


_Key = tuple
"""A state: ``("text", ids so far)``, ``("audio", positions and frames so far)`` or ``("finished",)``."""
_TEXT: _Key = ("text", 0)
_FINISHED: _Key = ("finished",)


def _audio_start(vocab: VocabLayout, num_before: int) -> _Key:
    """The state of audio that goes on after so many frames.

    With at least as many frames as codebooks it does not depend on their number, apart from the maximum.
    """
    layout = vocab.codec_layout
    codes = np.zeros((num_before, layout.num_codebooks), dtype=np.int64)
    return ("audio", len(layout.encode_open(codes)[0]) if num_before else 0, num_before)


@dataclasses.dataclass
class _State:
    """allowed: ids, as ranges, or the name of a set of :class:`_Tables`. following: after each kind; None: the end."""

    allowed: tuple[range | str, ...]
    following: tuple[_Key | None, ...]
    has_no_code: Sequence[np.ndarray] | None = None


class _Tables:
    """Numbers the states that can be reached, and writes down what each allows."""

    def __init__(self, vocab: VocabLayout, ids: range, ends: tuple[int, ...]) -> None:
        self.layout, self._vocab, self._ids, self._end_ids = vocab.codec_layout, vocab, ids, ends
        self.ends = tuple(range(end, end + 1) for end in ends)
        self._sets: dict[str, torch.Tensor] = {}
        self._states = [_State(self.ends, (None,) * _KINDS)]

    def words(self, num_text_ids: int, forbidden: tuple[int, ...]) -> str:
        """The name of the set of ids that text consists of."""
        ids = torch.arange(self._ids.start, self._ids.stop)
        is_word = (self._vocab.modality_of(ids) == Modality.TEXT) & (ids < num_text_ids)
        is_word[[marker - self._ids.start for marker in forbidden]] = False
        self._sets["words"] = is_word
        return "words"

    def audio(self, state: _Key, max_frames: int, stops: tuple[range, ...], after: _Key | None) -> _State:
        """A state inside audio, which one of ``stops`` ends."""
        _, position, num_frames = state
        layout = self.layout
        ids, may_end = layout.allowed_next(position, num_frames)
        leading, may_lead = layout.leading_ids, num_frames < max_frames
        leads = range(max(ids.start, leading.start), min(ids.stop, leading.stop) if may_lead else 0)
        others = (range(ids.start, min(ids.stop, leading.start)), range(max(ids.start, leading.stop), ids.stop))
        other = next((run for run in others if len(run)), None)
        following: list[_Key | None] = [None, None, after, after]
        has_no_code = [np.ones(layout.num_codebooks, dtype=bool)] * _KINDS
        for kind, run, frames in ((_OTHER, other, num_frames), (_LEADING, leads, num_frames + 1)):
            if run:
                following[kind] = ("audio", position + 1, frames)
                has_no_code[kind] = self._without_code(position, frames, run.start)
        allowed = tuple(run for run in (*others, leads) if len(run)) + (stops if may_end else ())
        return _State(allowed, tuple(following), has_no_code)

    def build(self, start: _Key, describe: Callable[[_Key], _State]) -> None:
        keys, self._number_of = [start], {start: 1}
        for key in keys:  # grows
            state = describe(key)
            self._states.append(state)
            for following in state.following:
                if following is not None and following not in self._number_of:
                    keys.append(following)
                    self._number_of[following] = len(keys)

    def grammar(self, *, has_codes: bool) -> Grammar:
        nothing = [np.ones(self.layout.num_codebooks, dtype=bool)] * _KINDS
        rows: dict[tuple[range | str, ...], int] = {}
        forbidden_in: list[int] = []
        next_state: list[int] = []
        for state in self._states:
            forbidden_in += [rows.setdefault(state.allowed, len(rows))] * _KINDS
            next_state += [DONE if key is None else _KINDS * self._number_of[key] for key in state.following]
        without = [row for state in self._states for row in state.has_no_code or nothing]
        return Grammar(
            ends=self._end_ids,
            ids=self._ids,
            forbidden=torch.stack([self._all_but(allowed) for allowed in rows]),
            forbidden_in=torch.tensor(forbidden_in),
            kind_of=self._kinds(),
            next_state=torch.tensor(next_state),
            has_no_code=torch.from_numpy(np.stack(without)) if has_codes else None,
        )

    def _kinds(self) -> torch.Tensor:
        kind_of = torch.full((len(self._ids),), _OTHER)
        kind_of[self._places(self.layout.leading_ids)] = _LEADING
        kind_of[self._places(range(self._vocab.begin_of_audio, self._vocab.end_of_audio + 1))] = _SWITCH
        for end in self.ends:
            kind_of[self._places(end)] = _END
        return kind_of

    def _without_code(self, position: int, num_frames: int, id_: int) -> np.ndarray:
        """``[C]`` bool for ``id_`` at ``position``; ``num_frames`` includes the frame that ``id_`` begins, if any."""
        codebooks = np.arange(self.layout.num_codebooks)
        if not self.layout.holds_side_codes(id_):
            return np.ones_like(codebooks, dtype=bool)
        return ~self.layout.has_code(position, num_frames, codebooks)

    def _all_but(self, allowed: tuple[range | str, ...]) -> torch.Tensor:
        mask = torch.ones(len(self._ids), dtype=torch.bool)
        for item in allowed:
            if isinstance(item, str):
                mask &= ~self._sets[item]
            else:
                mask[self._places(item)] = False
        return mask

    def _places(self, ids: range) -> slice:
        return slice(max(ids.start - self._ids.start, 0), max(ids.stop - self._ids.start, 0))
