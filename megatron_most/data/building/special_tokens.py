"""The table of special ids that templates put between text and audio. Every build checks it."""

from __future__ import annotations

from megatron_most.errors import ConfigError
from megatron_most.text import TextTokenizer
from megatron_most.vocab import Modality, VocabLayout

ROLE_MARKERS: dict[str, tuple[str, ...]] = {
    "system": ("<|system|>", "<｜System｜>"),
    "user": ("<|user|>", "<｜User｜>"),
    "assistant": ("<|assistant|>", "<｜Assistant｜>"),
}
"""The token that begins a turn of each role, under the names that tokenizers use."""


def special_tokens(vocab: VocabLayout, tokenizer: TextTokenizer, *, roles: bool = False) -> dict[str, int]:
    """Name -> id of every special token: ``bos``, ``eos``, ``begin_of_audio``, ``end_of_audio``, ``frame``, roles.

    A role's marker is the tokenizer's special token with a name from :data:`ROLE_MARKERS`. If it has none, the marker
    is one of the layout's last text ids, beyond the tokenizer's, so that no text encodes to it.

    Args:
        roles: include the role markers, which chat needs.

    Raises:
        ConfigError: names a marker that has no id, another marker's id, or an id of the wrong modality.
    """
    table = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "begin_of_audio": vocab.begin_of_audio,
        "end_of_audio": vocab.end_of_audio,
        "frame": vocab.frame,
    }
    if roles:
        table |= _role_markers(vocab, tokenizer)
    seen: dict[int, str] = {}
    for name, token in table.items():
        if token in seen and {name, seen[token]} != {"bos", "eos"}:  # some tokenizers use one id for both
            raise ConfigError(f"special token {name}: id {token} is already that of {seen[token]}")
        seen[token] = name
        is_audio = name in ("begin_of_audio", "end_of_audio", "frame")
        if vocab.modality_of(token) != (Modality.AUDIO if is_audio else Modality.TEXT):
            raise ConfigError(
                f"special token {name}: id {token} is {vocab.modality_names[vocab.modality_of(token)]}, must be"
                f" {'audio' if is_audio else 'text'}"
            )
    return table


def _role_markers(vocab: VocabLayout, tokenizer: TextTokenizer) -> dict[str, int]:
    markers: dict[str, int] = {}
    spare = vocab.text_vocab_size
    for role, names in ROLE_MARKERS.items():
        found = [token for token in map(tokenizer.special_id, names) if token is not None]
        if found:
            markers[role] = found[0]
            continue
        spare -= 1
        if spare < tokenizer.vocab_size:
            raise ConfigError(
                f"special token {role}: the tokenizer has none of {', '.join(names)}, and the layout's"
                f" {vocab.text_vocab_size} text ids leave no id for it; set text_vocab_size to at least"
                f" {tokenizer.vocab_size + len(ROLE_MARKERS)}"
            )
        markers[role] = spare
    return markers
