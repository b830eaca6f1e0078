"""The records of a shard -> waveforms -> codes, committed together.

Shape letters: C codebooks, F codec frames. Codes are ``[F, C]``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import numpy as np

from megatron_most.audio import AudioCodec
from megatron_most.audio.io import stream_audio
from megatron_most.data.preparation.manifest import Record, check_duration, open_audio
from megatron_most.data.preparation.shards import Limits, Shard
from megatron_most.data.preparation.sources import Roots
from megatron_most.data.storage.indexed import smallest_dtype
from megatron_most.errors import DataError
from megatron_most.files import replacing, write_text

SILENCE_PEAK = 1e-4
"""Audio whose peak does not exceed this (-80 dB) counts as silence."""


def encode_shard(
    shard: Shard,
    codec: AudioCodec,
    roots: Roots,
    limits: Limits,
    report: Callable[[int, int, int], None],
    should_stop: Callable[[], bool],
) -> None:
    """Encode and commit one shard; commits nothing when asked to stop.

    Args:
        report: called with the numbers of files done, samples encoded and files rejected.

    Raises:
        DataError: from the codec, or if the disk is full. Audio that cannot be used is listed as rejected instead.
    """
    batches = _Batches(codec)
    rejected: list[str] = []
    kept: list[tuple[Record, int]] = []
    for index, record in enumerate(shard.records()):
        if should_stop():
            return
        num_pieces = num_samples = 0
        pieces = utterances_of(record, codec, roots, limits)
        while True:
            try:
                piece = next(pieces, None)
            except DataError as error:
                batches.drop(index)
                rejection = {"where": record.where, "reason": str(error), "id": record.id}
                rejected.append(json.dumps(rejection, ensure_ascii=False) + "\n")
                report(1, 0, 1)
                break
            if piece is None:
                kept.append((record, index))
                report(1, num_samples, 0)
                break
            batches.add((index, num_pieces), piece)
            num_pieces, num_samples = num_pieces + 1, num_samples + len(piece)
    batches.flush()
    lines, codes = [], []
    for record, index in kept:
        pieces_codes = batches.take(index)
        for number, piece_codes in enumerate(pieces_codes):
            chunk = (number, len(pieces_codes)) if len(pieces_codes) > 1 else None
            lines.append(json.dumps(_line(record, len(piece_codes), chunk), ensure_ascii=False) + "\n")
            codes.append(piece_codes.tobytes())
    with replacing(f"{shard.prefix}.codes", durable=True) as temporary:
        temporary.write_bytes(b"".join(codes))
    write_text(f"{shard.prefix}.rejected.jsonl", "".join(rejected))
    write_text(f"{shard.prefix}.jsonl", "".join(lines))


def _line(record: Record, num_frames: int, chunk: tuple[int, int] | None) -> dict:
    line = {"id": record.id, "text": record.text, "num_frames": num_frames}
    if chunk is not None:
        line |= {"id": f"{record.id}#{chunk[0]}", "text": "", "chunk": list(chunk)}
    more = {name: getattr(record, name) for name in ("language", "speaker", "split")}
    return line | {name: value for name, value in more.items() if value is not None}


def utterances_of(record: Record, codec: AudioCodec, roots: Roots, limits: Limits) -> Iterator[np.ndarray]:
    """The waveforms of a record: one, or chunks of ``limits.max_seconds`` and a remainder.

    Raises:
        DataError: the audio cannot be used. This may happen after some chunks and applies to the whole record.
    """
    roots.resolve(record.audio)  # links may have changed since the manifest was made
    rate = codec.sample_rate
    chunk = max(1, round(limits.max_seconds * rate) // codec.samples_per_frame) * codec.samples_per_frame
    pieces = stream_audio(
        open_audio(record),
        rate,
        offset=record.offset or 0.0,
        duration=None if record.offset is None else record.duration,
        channel=record.channel,
        chunk=chunk,
    )
    peak, samples = 0.0, 0
    waiting: np.ndarray | None = None
    for piece in pieces:
        if waiting is not None and len(piece) < codec.min_samples:  # only the last one can be that short
            piece, samples, waiting = np.concatenate([waiting, piece]), samples - len(waiting), None
        if waiting is not None:
            if record.text and not limits.chunk_transcribed:
                raise DataError(
                    f"{record.audio}: longer than {limits.max_seconds:g} s, and nothing says which part of the text is"
                    " said where (--max-seconds, --chunk-transcribed)"
                )
            yield waiting
        waiting, samples, peak = piece, samples + len(piece), max(peak, float(np.abs(piece).max()))
    if record.offset is None:
        check_duration(record, samples / rate)
    if samples < codec.min_samples:
        raise DataError(f"{record.audio}: {samples} samples at {rate} Hz; the codec needs {codec.min_samples}")
    if peak < SILENCE_PEAK:
        raise DataError(f"{record.audio}: silence: no sample exceeds {SILENCE_PEAK:g}")
    assert waiting is not None, "the codec needs at least one sample"
    yield waiting


class _Batches:
    """Collects waveforms into batches of one shape. Which waveforms share a batch does not change their codes."""

    def __init__(self, codec: AudioCodec) -> None:
        self._codec = codec
        self._dtype = smallest_dtype(codec.codebook_size)
        self._waiting: dict[tuple[int, int], list[tuple[tuple[int, int], np.ndarray]]] = {}
        self._codes: dict[tuple[int, int], np.ndarray] = {}

    def add(self, key: tuple[int, int], waveform: np.ndarray) -> None:
        shape = self._codec.batch_shape(len(waveform))
        batch = self._waiting.setdefault(shape, [])
        batch.append((key, waveform))
        if len(batch) == shape[0]:
            self._encode(self._waiting.pop(shape))

    def flush(self) -> None:
        for batch in self._waiting.values():
            self._encode(batch)
        self._waiting.clear()

    def drop(self, index: int) -> None:
        """Discard all pieces of record ``index``."""
        self._codes = {key: codes for key, codes in self._codes.items() if key[0] != index}
        for shape, batch in list(self._waiting.items()):
            self._waiting[shape] = [item for item in batch if item[0][0] != index]

    def take(self, index: int) -> list[np.ndarray]:
        """Codes ``[F, C]`` of the pieces of record ``index``, in order."""
        pieces: list[np.ndarray] = []
        while (codes := self._codes.pop((index, len(pieces)), None)) is not None:
            pieces.append(codes)
        return pieces

    def _encode(self, batch: list[tuple[tuple[int, int], np.ndarray]]) -> None:
        if batch:
            encoded = self._codec.encode_batch([waveform for _, waveform in batch])
            self._codes |= {key: codes.astype(self._dtype) for (key, _), codes in zip(batch, encoded, strict=True)}
