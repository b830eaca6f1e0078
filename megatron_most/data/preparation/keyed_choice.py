"""Random choices that depend on a key alone: the same on every machine and in every run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def choose[Option](options: Sequence[Option], *key: object) -> Option:
    """One of ``options``, at least one, each with the same probability over all keys."""
    digest = hashlib.blake2b("\x00".join(map(str, key)).encode(), digest_size=8).digest()
    return options[int(int.from_bytes(digest, "big") / 2**64 * len(options))]
