"""An exchange as messages of a chat: what the page shows.

Shape letters: T samples.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_most.demo.host import Exchange

Message = dict[str, Any]
"""``role`` and ``content``: a list of texts, and of files as ``{"path": ...}``."""

_SPEAKING = "speaking"


def messages_of(exchange: Exchange, save: Callable[[np.ndarray], str]) -> list[Message]:
    """The visitor's message and the model's, as far as they are known.

    Args:
        save: writes a waveform ``[T]`` and returns the path of the file. It is called once the exchange is over.
    """
    said: list[Any] = [exchange.said] if exchange.said.strip() else []
    if exchange.recording is not None:
        said.append({"path": str(exchange.recording)})
    if exchange.heard:
        said.append(f"The model hears: {exchange.heard}")
    answered: list[Any] = []
    for part in exchange.parts:
        if isinstance(part, str):
            answered.append(part)
        elif exchange.is_over:
            answered.append({"path": save(part)})
        else:
            answered.append(f"{_SPEAKING} … {len(part) / exchange.sample_rate:.1f} s")
    if exchange.transcript:
        answered.append(f"The model hears itself say: {exchange.transcript}")
    if not answered:
        answered = ["no answer" if exchange.is_over else "…"]
    return [{"role": "user", "content": said}, {"role": "assistant", "content": answered}]


def stopped(messages: list[Message]) -> list[Message]:
    """The messages after the visitor has stopped the answer."""
    if not messages or messages[-1]["role"] != "assistant":
        return messages
    last = messages[-1]
    content = [
        f"stopped while {one}" if isinstance(one, str) and one.startswith(_SPEAKING) else one for one in last["content"]
    ]
    return [*messages[:-1], {**last, "content": ["stopped" if one == "…" else one for one in content]}]


def kept(messages: list[Message]) -> list[Message]:
    """The messages without files that were deleted since."""

    def there(one: Any) -> Any:
        return one if isinstance(one, str) or Path(one["path"]).is_file() else "speech that is no longer kept"

    return [{**message, "content": list(map(there, message["content"]))} for message in messages]


def pcm(waveform: np.ndarray) -> str:
    """``waveform [T]`` as 16-bit samples in base64; values beyond -1..1 are clipped."""
    samples = np.round(np.clip(waveform, -1.0, 1.0) * 32767).astype("<i2")
    return base64.b64encode(samples.tobytes()).decode("ascii")
