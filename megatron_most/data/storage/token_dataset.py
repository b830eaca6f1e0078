"""Datasets on disk: Megatron ``IndexedDataset`` pairs and a JSON sidecar.

A dataset ``<prefix>`` consists of the pairs (``.bin`` and ``.idx``) ``<prefix>.ids``, ``<prefix>.mask`` and, for speech
in the ``frame`` layouts, ``<prefix>.codes``, and of ``<prefix>.json``, the sidecar. The sidecar is written last, so a
dataset that has one is complete.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_most.data.storage.documents import TASKS, Document
from megatron_most.data.storage.indexed import ArrayReader, ArrayWriter, smallest_dtype
from megatron_most.data.storage.sidecar import read_sidecar, with_current_keys, write_sidecar
from megatron_most.errors import ConfigError, DataError
from megatron_most.vocab import NO_CODE, VocabLayout, check_codes


def _num_stored(vocab: VocabLayout) -> int:
    """Number of values of a stored code. ``NO_CODE`` (-1) does not fit unsigned types: it is stored as the last one."""
    return vocab.codebook_size + vocab.codec_layout.is_delayed


def _in_range(values: np.ndarray, stop: int) -> bool:
    """Whether all values are in ``0 .. stop - 1``; one pass over unsigned values, two over signed ones."""
    return not values.size or (values.max() < stop and (values.dtype.kind == "u" or values.min() >= 0))


class DatasetWriter:
    """Context manager that writes a :class:`TokenDataset`. Nothing remains on disk without :meth:`commit`.

    Raises:
        DataError: in place of any ``OSError`` inside the context, such as a full disk.
    """

    def __init__(self, prefix: str | Path, task: str, vocab: VocabLayout) -> None:
        self._prefix, self._task, self._vocab = str(prefix), task, vocab
        self._arrays = {
            "ids": ArrayWriter(self._prefix + ".ids", smallest_dtype(vocab.size)),
            "mask": ArrayWriter(self._prefix + ".mask", np.uint8),
        }
        if vocab.codec_layout.uses_side_codes:
            self._arrays["codes"] = ArrayWriter(self._prefix + ".codes", smallest_dtype(_num_stored(vocab)))
        self._holds_codes = False
        self._modality_positions = np.zeros(len(vocab.modality_names), dtype=np.int64)

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        for array in self._arrays.values():
            array.discard()
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise DataError(f"dataset {self._prefix}: cannot be written: {reason}") from None

    def add(self, document: Document) -> None:
        assert len(document) > 1, "a document needs an input and a target"
        self._arrays["ids"].add(document.ids)
        self._arrays["mask"].add(document.loss_mask.astype(np.uint8))
        # The last id is only a label, never an input.
        modality = self._vocab.modality_of(document.ids[:-1])
        self._modality_positions += np.bincount(modality, minlength=len(self._modality_positions))
        if "codes" in self._arrays:
            is_coded = self._vocab.codec_layout.holds_side_codes(document.ids)
            assert document.coded is not None and document.codes is not None, "this layout uses side codes"
            assert np.array_equal(document.coded, np.flatnonzero(is_coded)), "codes must match the ids that hold some"
            codes = document.codes.reshape(-1)
            self._holds_codes |= codes.size > 0
            self._arrays["codes"].add(np.where(codes == NO_CODE, self._vocab.codebook_size, codes))

    def commit(self, provenance: dict) -> None:
        """Rename the files to their final names and write the sidecar last."""
        Path(self._prefix + ".json").unlink(missing_ok=True)  # an older dataset is invalid from here on
        for name, array in self._arrays.items():
            if name != "codes" or self._holds_codes:
                array.commit()
        sidecar = {
            "task": self._task,
            "vocab": self._vocab.to_dict(),
            "holds_codes": self._holds_codes,
            "input_positions": dict(zip(self._vocab.modality_names, self._modality_positions.tolist(), strict=True)),
            "provenance": provenance,
        }
        write_sidecar(self._prefix + ".json", sidecar)


class TokenDataset:
    """Documents of one task, built by :func:`megatron_most.data.building.build.build_dataset`.

    Attributes:
        task: one of :data:`TASKS`.
        vocab: the vocabulary layout of its ids.
        input_positions: modality -> input positions in all documents; the last id of a document is only a label.
        provenance: ``tokenizer`` and ``codec`` with their fingerprints, ``template_version``,
            ``counts``, ``sources``, ``licenses``, ``tool_version``, ``command``.
        lengths: ``[len(self)]`` int32, positions of each document.

    Raises:
        DataError: a file is missing or truncated, or the files disagree; from :meth:`document` and :meth:`read`, an id
            or code outside the layout.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        sidecar = with_current_keys(read_sidecar(self.prefix + ".json", f"dataset {self.prefix}"))
        self.task: str = sidecar.get("task", "")
        if self.task not in TASKS:
            raise DataError(f"dataset {self.prefix}: task={self.task!r}: must be one of {', '.join(TASKS)}")
        try:
            self.vocab = VocabLayout(**sidecar["vocab"])
            self.provenance: dict = sidecar["provenance"]
            self.input_positions: dict[str, int] = sidecar["input_positions"]
            holds_codes = sidecar["holds_codes"]
            counts = [self.input_positions[name] for name in self.vocab.modality_names]
            if not isinstance(self.provenance, dict) or not all(type(count) is int and count >= 0 for count in counts):
                raise TypeError("provenance must be an object, and input_positions numbers")
        except (AttributeError, KeyError, TypeError, ConfigError) as error:
            raise DataError(f"dataset {self.prefix}: broken sidecar: {error}") from None
        self._layout = self.vocab.codec_layout
        self._num_ids = self.vocab.size
        self._ids = ArrayReader(self.prefix + ".ids")
        self._mask = ArrayReader(self.prefix + ".mask")
        self._codes = ArrayReader(self.prefix + ".codes") if holds_codes else None
        self.lengths = self._ids.lengths
        if not np.array_equal(self.lengths, self._mask.lengths):
            raise DataError(f"dataset {self.prefix}: ids and mask differ in their lengths")
        if self._codes is not None and len(self._codes) != len(self):
            raise DataError(f"dataset {self.prefix}: ids and codes differ in their number of documents")

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def audio_share(self) -> float:
        """Share of audio in the input positions."""
        return self.input_positions["audio"] / max(1, sum(self.input_positions.values()))

    def __iter__(self) -> Iterator[Document]:
        return map(self.document, range(len(self)))

    def document(self, index: int) -> Document:
        """Document ``index``; its ids and codes are checked against the layout."""
        return self.read(np.array([index]))

    def read(self, indices: np.ndarray) -> Document:
        """Documents ``indices``, at least one, concatenated; ids and codes are checked against the layout."""
        ids = self._ids.read(indices, np.int64)
        if not _in_range(ids.view(np.uint64), self._num_ids):  # a negative id becomes a huge one
            for index in indices.tolist():
                self.vocab.check_ids(self._ids[index].astype(np.int64), f"dataset {self.prefix}, document {index}")
        loss_mask = self._mask.read(indices, np.bool_)
        if not self._layout.uses_side_codes:
            return Document(ids, loss_mask)
        num_codebooks = self.vocab.num_codebooks
        if self._codes is None:
            nothing = np.empty((0, num_codebooks), dtype=np.int64)
            return Document(ids, loss_mask, nothing[:, 0], nothing)
        codes, coded = self._codes.read(indices), np.flatnonzero(self._layout.holds_side_codes(ids))
        if codes.size != coded.size * num_codebooks or not _in_range(codes, _num_stored(self.vocab)):
            self._explain_codes(indices)
        if self._layout.is_delayed:
            codes = codes.astype(np.int64)
            codes[codes == self.vocab.codebook_size] = NO_CODE
        return Document(ids, loss_mask, coded, codes.reshape(-1, num_codebooks))

    def digest(self, index: int) -> bytes:
        """A hash of the ids and codes of document ``index``."""
        digest = hashlib.blake2b(self._ids[index].tobytes(), digest_size=16)
        if self._codes is not None:
            digest.update(self._codes[index].tobytes())
        return digest.digest()

    def _explain_codes(self, indices: np.ndarray) -> None:
        """Raise for the document that has too many codes, too few, or one outside its codebook."""
        for index in indices.tolist():
            where = f"dataset {self.prefix}, document {index}"
            assert self._codes is not None, "called after reading codes"
            stored = self._codes[index].astype(np.int64)
            num_frames = np.count_nonzero(self._layout.holds_side_codes(self._ids[index]))
            if stored.size != num_frames * self.vocab.num_codebooks:
                raise DataError(
                    f"{where}: {stored.size} codes for {num_frames} frames of {self.vocab.num_codebooks} codebooks"
                )
            codes = stored.reshape(-1, self.vocab.num_codebooks)
            check_codes(codes, self.vocab.num_codebooks, _num_stored(self.vocab), where)
