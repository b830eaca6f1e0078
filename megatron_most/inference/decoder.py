"""One generation step on tensors of fixed shapes, without any result that the host reads.

A step reads and writes the same memory every time. On a GPU it is captured once as a CUDA graph and then replayed.

Shape letters: b rows, s prompt positions, k positions of the cache, C codebooks, K codes, V ids of the grammar.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from megatron_most import parallel
from megatron_most.errors import first_line
from megatron_most.inference.grammar import DONE, Grammar
from megatron_most.inference.past import Past
from megatron_most.inference.sampling import Sampling
from megatron_most.vocab import NO_CODE, VocabLayout


class Decoder:
    """Continues a batch of ``num_rows`` prompts under one grammar.

    ``ids [b, k]`` and ``codes [b, k, C]`` hold the generated ids and codes at their positions; ``codes`` is None if the
    grammar has none.

    Args:
        past: reads the prompts, and every position that is chosen.
        num_positions: the most positions of prompt and continuation together.
        cuda_graph: capture the step as a CUDA graph and replay it.
    """

    def __init__(
        self,
        past: Past,
        vocab: VocabLayout,
        grammar: Grammar,
        sampling: Sampling,
        num_rows: int,
        num_positions: int,
        cuda_graph: bool,
    ) -> None:
        self.vocab, self.grammar, self.sampling = vocab, grammar, sampling
        self.num_rows, self.num_positions = num_rows, num_positions
        self._past = past

        def tensor(*shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=past.position.device)

        self.ids = tensor(num_rows, num_positions)
        self._state = tensor(num_rows)
        self._new_ids, self._is_padding = tensor(num_rows, 1), tensor(num_rows, 1, dtype=torch.bool)
        self.codes: torch.Tensor | None = None
        self._new_codes: torch.Tensor | None = None
        if grammar.has_no_code is not None:
            self.codes = tensor(num_rows, num_positions, vocab.num_codebooks)
            self._new_codes = tensor(num_rows, 1, vocab.num_codebooks)
        self._noise: torch.Tensor | None = None
        self._code_noise: torch.Tensor | None = None
        if sampling.is_random:
            self._noise = tensor(num_rows, len(grammar.ids), dtype=torch.float32)
            if self.codes is not None:
                self._code_noise = tensor(num_rows, vocab.num_codebooks, vocab.codebook_size, dtype=torch.float32)
        # The text ids that a row has, and a column for all others.
        self._num_penalized = max(0, min(grammar.ids.stop, vocab.text_vocab_size) - grammar.ids.start)
        self._is_said: torch.Tensor | None = None
        if sampling.repetition_penalty != 1 and self._num_penalized:
            self._is_said = tensor(num_rows, self._num_penalized + 1, dtype=torch.bool)
        self._run: Callable[[], None] = _GraphedCall(self._step) if cuda_graph else self._step

    @property
    def is_recorded(self) -> bool:
        return isinstance(self._run, _GraphedCall) and self._run.is_recorded

    def fits(self, grammar: Grammar, sampling: Sampling, num_rows: int, num_positions: int) -> bool:
        """Whether this decoder can continue such a batch. The seed of ``sampling`` does not matter."""
        return (
            self.grammar is grammar
            and self.sampling.with_seed(0) == sampling.with_seed(0)
            and self.num_rows == num_rows
            and self.num_positions >= num_positions
        )

    def start(
        self, ids: torch.Tensor, codes: torch.Tensor, is_padding: torch.Tensor, random: list[torch.Generator]
    ) -> None:
        """Read the prompts and choose the first new position.

        Args:
            ids, codes: ``[b, s]`` and ``[b, s, C]``, padded on the left.
            is_padding: ``[b, s]`` bool.
            random: the random number generator of each row.
        """
        self._state.copy_(self.grammar.start(self.num_rows))
        if self._is_said is not None:
            places = (ids - self.grammar.ids.start).masked_fill(is_padding, self._num_penalized)
            self._is_said.zero_().scatter_(1, places.clamp(max=self._num_penalized), True)
        logits = self._past.read_prompt(ids, codes, is_padding)
        self._draw(random)
        self._choose(*logits)

    def advance(self, random: list[torch.Generator]) -> None:
        """Read the position chosen last and choose the next."""
        self._draw(random)
        self._run()

    def chosen(self, positions: slice) -> tuple[np.ndarray, np.ndarray]:
        """Ids ``[b, n]`` and codes ``[b, n, C]`` of these positions, on the host."""
        ids = self.ids[:, positions].cpu().numpy()
        if self.codes is None:
            return ids, np.full((*ids.shape, self.vocab.num_codebooks), NO_CODE)
        return ids, self.codes[:, positions].cpu().numpy()

    def all_done(self) -> bool:
        """Whether all rows have ended, on all ranks that hold the model together. The host waits for the device.

        Ranks with the same prompts may differ in rounding, and with it in where a row ends.
        """
        is_done = (self._state == DONE).all().int()
        if dist.is_initialized() and (group := parallel.whole_model_group()).size() > 1:
            dist.all_reduce(is_done, dist.ReduceOp.MIN, group=group)
        return bool(is_done)

    def _step(self) -> None:
        self._choose(*self._past.read_next(self._new_ids, self._new_codes, self._is_padding))

    def _draw(self, random: list[torch.Generator]) -> None:
        for noise in (self._noise, self._code_noise):
            if noise is not None:
                for row, generator in zip(noise, random, strict=True):
                    row.exponential_(generator=generator)

    def _choose(self, logits: torch.Tensor, code_logits: torch.Tensor | None) -> None:
        """Choose ids and codes at the next position from logits ``[b, 1, V]`` and ``[b, 1, C, K]``."""
        logits = logits[:, -1].masked_fill(self.grammar.forbidden_after(self._state), float("-inf"))
        if self._is_said is not None:
            self.sampling.penalize(logits[:, : self._num_penalized], self._is_said[:, :-1])
        choice = self.sampling.choose(logits, self._noise)
        if self._is_said is not None:
            self._is_said.scatter_(1, choice.clamp(max=self._num_penalized)[:, None], True)
        has_no_code = self.grammar.advance(self._state, choice)
        position = self._past.position
        torch.add(choice[:, None], self.grammar.ids.start, out=self._new_ids)
        torch.eq(self._state[:, None], DONE, out=self._is_padding)
        self.ids.index_copy_(1, position, self._new_ids)
        if has_no_code is not None:
            assert code_logits is not None and self.codes is not None and self._new_codes is not None
            codes = self.sampling.choose(code_logits[:, -1, :, : self.vocab.codebook_size], self._code_noise)
            self._new_codes.copy_(codes.masked_fill(has_no_code, NO_CODE)[:, None])
            self.codes.index_copy_(1, position, self._new_codes)


class _GraphedCall:
    """A call that is captured as a CUDA graph after a few normal runs, which compile kernels and fill caches.

    If it cannot be captured, it keeps running normally, and a warning says why.
    """

    WARM_UP = 3

    def __init__(self, call: Callable[[], None]) -> None:
        self._call, self._calls = call, 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream()

    @property
    def is_recorded(self) -> bool:
        return self._graph is not None

    def __call__(self) -> None:
        if self._calls == self.WARM_UP:
            self._record()
        self._calls += 1
        if self._graph is not None:
            self._graph.replay()
        elif self._calls > self.WARM_UP:
            self._call()
        else:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._call()
            torch.cuda.current_stream().wait_stream(self._stream)

    def _record(self) -> None:
        """Capture the graph. Capturing does not execute anything."""
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: other threads may call CUDA during the capture.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._call()
        except RuntimeError as error:
            reason = first_line(error)
            logging.getLogger(__name__).warning("generating without a CUDA graph, several times slower: %s", reason)
        else:
            self._graph = graph
