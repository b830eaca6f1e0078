"""Which utterances a dataset was built from, so that validation on what is trained on can be refused.

``<prefix>.utterances.npy`` is ``[n, 2]`` uint64: of each utterance a hash of its id and length, and one of its codes.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megatron_most.config import DataConfig
from megatron_most.data.storage.codes import CodesDataset
from megatron_most.errors import ConfigError, DataError, first_line


def write_utterances(prefix: str | Path, codes: Iterable[CodesDataset]) -> None:
    """Write the hashes of all utterances of ``codes`` beside the dataset ``prefix``.

    An OSError is left to the :class:`~megatron_most.data.storage.token_dataset.DatasetWriter` around it.
    """
    hashes = [_hashes(utterance.id, utterance.codes) for source in codes for utterance in source]
    content = io.BytesIO()
    np.save(content, np.array(hashes, dtype=np.uint64).reshape(-1, 2))
    path = _file(prefix)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.getvalue())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def require_disjoint(data: DataConfig) -> None:
    """Raise :class:`ConfigError` when a validation dataset holds an utterance of a training dataset.

    An utterance is the same when its id and length are, or its audio is. Datasets without a list of utterances (built
    by version 0.1) are not compared.
    """
    trained = {entry.path: _read(entry.path) for entry in data.train}
    for entry in data.validation:
        found = _read(entry.path)
        for prefix, hashes in trained.items():
            is_shared = np.isin(found[:, 0], hashes[:, 0]) | np.isin(found[:, 1], hashes[:, 1])
            if is_shared.any():
                raise ConfigError(
                    f"data.validation: {entry.path} shares {is_shared.sum()} of its {len(found)} utterances with"
                    f" {prefix} of data.train; validate on others"
                )


def _hashes(identity: str, codes: np.ndarray) -> tuple[int, int]:
    parts = (f"{len(codes)} {identity}".encode("utf-8", "surrogatepass"), codes.tobytes())
    of_id, of_codes = (int.from_bytes(hashlib.blake2b(part, digest_size=8).digest(), "little") for part in parts)
    return of_id, of_codes


def _read(prefix: str | Path) -> np.ndarray:
    """``[n, 2]``; n is 0 where nothing is known."""
    path = _file(prefix)
    if not path.is_file():
        return np.empty((0, 2), dtype=np.uint64)
    try:
        hashes = np.load(path, allow_pickle=False, mmap_mode="r")  # mapped: a header may promise any size
    except Exception as error:  # NumPy evaluates the header, which can raise anything
        raise DataError(f"{path}: not readable: {first_line(error)}") from None
    if not isinstance(hashes, np.ndarray):
        raise DataError(f"{path}: holds several arrays, not two hashes of each utterance")
    if hashes.ndim != 2 or hashes.shape[1] != 2 or hashes.dtype != np.uint64:
        raise DataError(f"{path}: holds {hashes.dtype} {list(hashes.shape)}, not two hashes of each utterance")
    return hashes


def _file(prefix: str | Path) -> Path:
    return Path(f"{prefix}.utterances.npy")
