"""Which turns of a conversation are spoken."""

from __future__ import annotations

from collections.abc import Container, Sequence

from megatron_most.data.preparation.chat_files import Chat
from megatron_most.data.preparation.keyed_choice import choose
from megatron_most.errors import ConfigError

MODES = ("T-T", "S-T", "T-S", "S-S")
"""What an exchange is: the user's turn, then the assistant's; T is text, S is speech."""


def check_modes(modes: Sequence[str]) -> None:
    """Raise :class:`ConfigError` unless ``modes`` are some of :data:`MODES`."""
    for mode in modes:
        if mode not in MODES:
            raise ConfigError(f"modes={mode!r}: must be one of {', '.join(MODES)}")
    if not modes:
        raise ConfigError(f"modes=[]: needs at least one of {', '.join(MODES)}")


def choose_mode(chat: Chat, place: int, modes: Sequence[str], spoken: Container[str | None]) -> str | None:
    """The mode of exchange ``place``, drawn in equal shares from those of ``modes`` that its recordings allow.

    Args:
        spoken: ids of the utterances that are there.

    Returns:
        None when the recordings allow none.
    """
    user, assistant = (message.audio in spoken for message in chat.exchanges[place])
    possible = [mode for mode in modes if (user or mode[0] == "T") and (assistant or mode[2] == "T")]
    return choose(possible, "mode", chat.id, place) if possible else None
