"""The errors a user can cause. Each carries one line that names the field, file or token, the value and the rule."""

import re

_MOST_CHARACTERS = 1500
_BREAK = re.compile(r"\s*[\t\n\v\f\r\x85\u2028\u2029]\s*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that move the cursor or turn the direction of writing."""


class MostError(Exception):
    """Base of every error that a command prints as one line instead of a traceback.

    Messages quote what files hold, which may be anything: a line break becomes a space, a control character an escape,
    and the middle of a message that is too long to be read is left out.
    """

    def __str__(self) -> str:
        text = _BREAK.sub(" ", super().__str__().strip())
        text = _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
        if len(text) <= _MOST_CHARACTERS:
            return text
        half = _MOST_CHARACTERS // 2
        return f"{text[:half]} ... {text[-half:]}"


class ConfigError(MostError):
    """A configuration, command line or environment that cannot work."""


class DataError(MostError):
    """Audio, text, manifests or datasets that are missing, broken or do not fit the model."""


class CheckpointError(MostError):
    """A checkpoint that is missing, incomplete, corrupt or belongs to another model or run."""


def first_line(error: BaseException) -> str:
    """The first line of an error of a library or the system, to quote in a message; its type's name if it is empty."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:  # without the number
        text = error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    lines = text.strip().splitlines()
    return lines[0] if lines else type(error).__name__


def shown(value: object, length: int = 200) -> str:
    """``repr(value)`` for a message, cut to ``length``: one line whatever a file holds."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= length else f"{text[: length - 3]}..."
