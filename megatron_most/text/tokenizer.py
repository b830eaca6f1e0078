"""Text <-> ids: SentencePiece models and Hugging Face ``tokenizer.json`` files behind one protocol."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

from megatron_most.errors import ConfigError, DataError, first_line, shown
from megatron_most.files import read_bytes, read_json, replacing

_MAX_VOCAB = 1 << 24
"""Ids of the largest tokenizer; embeddings are made for all of them."""


class TextTokenizer(Protocol):
    """Text <-> ids ``0 .. vocab_size - 1``. Special ids are never made from text, whatever the text spells."""

    vocab_size: int
    """Highest id + 1."""

    bos_id: int
    eos_id: int
    pad_id: int
    fingerprint: str
    """SHA-256 of all that decides which ids a text becomes."""

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without beginning or end of sequence."""
        ...

    def special_id(self, token: str) -> int | None:
        """Id of the special token of that name, which text never becomes; None when there is none."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; special ids vanish. Raises :class:`DataError` for ids outside the vocabulary."""
        ...


def load_tokenizer(path: str | Path) -> TextTokenizer:
    """Load a SentencePiece ``.model``, a ``tokenizer.json``, or a folder that holds one of them.

    A ``tokenizer.json`` needs ``tokenizer_config.json`` or ``special_tokens_map.json`` beside it, which say what its
    beginning and end of sequence are.

    Raises:
        ConfigError: no such file, or none that can be read as a tokenizer.
    """
    path = Path(path)
    if path.is_dir():
        candidates = [path / "tokenizer.json", path / "tokenizer.model"]
        path = next((candidate for candidate in candidates if candidate.is_file()), candidates[0])
    if not path.is_file():
        raise ConfigError(f"tokenizer {path}: no such file")
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    raise ConfigError(f"tokenizer {path}: must be a SentencePiece .model or a Hugging Face tokenizer.json")


class SentencePieceTokenizer:
    """A SentencePiece model with beginning and end of sequence; without a padding id it pads with the end."""

    def __init__(self, path: Path) -> None:
        data = read_bytes(path)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError:
            raise ConfigError(f"tokenizer {path}: not readable as a SentencePiece model") from None
        self.vocab_size = self._processor.vocab_size()
        self.bos_id, self.eos_id = self._processor.bos_id(), self._processor.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ConfigError(f"tokenizer {path}: has no beginning or no end of sequence")
        self.pad_id = self._processor.pad_id() if self._processor.pad_id() >= 0 else self.eos_id
        self.fingerprint = hashlib.sha256(data).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def special_id(self, token: str) -> int | None:
        token_id = self._processor.piece_to_id(token)
        is_it = self._processor.id_to_piece(token_id) == token and self._processor.is_control(token_id)
        return token_id if is_it else None

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(_checked(ids, self.vocab_size))

    def piece(self, token_id: int) -> str:
        """What the model calls an id."""
        return self._processor.id_to_piece(token_id)


class HuggingFaceTokenizer:
    """A ``tokenizer.json`` through the ``tokenizers`` library."""

    def __init__(self, path: Path) -> None:
        data = read_bytes(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare Exception, and its panics are not even that
            raise ConfigError(f"tokenizer {path}: not readable as a tokenizer.json: {first_line(error)}") from None
        # Text that spells a special token stays text: a transcript must not be able to end its own document.
        self._tokenizer.encode_special_tokens = True
        # Settings of whoever saved the file, for batches of theirs.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not 0 < self.vocab_size <= _MAX_VOCAB:
            raise ConfigError(f"tokenizer {path}: has {self.vocab_size:,} ids, must have 1 to {_MAX_VOCAB:,}")
        added = self._tokenizer.get_added_tokens_decoder().items()
        self._special_ids = {entry.content: token_id for token_id, entry in added if entry.special}
        special = _special_tokens(path.parent)
        self.bos_id = self._special_id(path, special, "bos_token")
        self.eos_id = self._special_id(path, special, "eos_token")
        self.pad_id = self._special_id(path, special, "pad_token") if special.get("pad_token") else self.eos_id
        ids = f"{self.bos_id} {self.eos_id}".encode()
        self.fingerprint = hashlib.sha256(data + ids).hexdigest()

    def _special_id(self, path: Path, special: dict[str, str], role: str) -> int:
        token = special.get(role)
        if not token:
            raise ConfigError(
                f"tokenizer {path}: neither tokenizer_config.json nor special_tokens_map.json sets {role}"
            )
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise ConfigError(f"tokenizer {path}: {role} {token!r} is not a single token of the vocabulary")
        return token_id

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def special_id(self, token: str) -> int | None:
        return self._special_ids.get(token)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(_checked(ids, self.vocab_size), skip_special_tokens=True)


def train_sentencepiece(texts: Iterable[str], path: str | Path, vocab_size: int) -> TextTokenizer:
    """Train a byte-pair SentencePiece model on ``texts``, write it to ``path`` (``.model``) and load it.

    Texts are kept as they are (no normalization) and what the training texts lack falls back to bytes, so that
    ``decode(encode(text)) == text``. With few distinct words the words themselves become pieces; merging then stops,
    and the vocabulary may stay below ``vocab_size``. The same texts give the same file.

    Raises:
        ConfigError: no text, or a vocabulary too small for the 256 bytes, 4 special ids and the texts' characters.
    """
    path = Path(path)
    if path.suffix != ".model":
        raise ConfigError(f"tokenizer {path}: a SentencePiece model's name must end in .model")
    texts = list(texts)
    if not any(text.strip() for text in texts):
        raise ConfigError(f"tokenizer {path}: no text to train on")
    minimum = 256 + 4 + len(set("".join(texts)) | {" "})
    if vocab_size < minimum:
        raise ConfigError(f"tokenizer {path}: vocab_size={vocab_size}: must be at least {minimum} for these texts")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        max_sentence_length=1 << 20,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    with replacing(path) as temporary:
        temporary.write_bytes(model.getvalue())
    return load_tokenizer(path)


def _special_tokens(folder: Path) -> dict[str, str]:
    """``bos_token``, ``eos_token`` and ``pad_token`` as the files beside ``tokenizer.json`` give them."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        entries = read_json(file)
        for role in ("bos_token", "eos_token", "pad_token"):
            value = entries.get(role)
            if isinstance(value, dict):
                value = value.get("content")
            if value:
                if not isinstance(value, str):
                    raise ConfigError(f"{file}: {role}={shown(value)}: must be a token")
                found[role] = value
    return found


def _checked(ids: Sequence[int], vocab_size: int) -> list[int]:
    ids = [int(token_id) for token_id in ids]
    for position, token_id in enumerate(ids):
        if not 0 <= token_id < vocab_size:
            raise DataError(f"id {token_id} at position {position} is outside the tokenizer (0..{vocab_size - 1})")
    return ids
