"""One base catches every error a user can cause, and nothing else."""

import pytest

from megatron_most.errors import CheckpointError, ConfigError, DataError, MostError, first_line


@pytest.mark.parametrize("kind", [ConfigError, DataError, CheckpointError])
def test_each_kind_is_a_most_error_and_no_other_kind(kind):
    with pytest.raises(MostError, match="a.yaml: line"):
        raise kind("a.yaml: line")
    others = {ConfigError, DataError, CheckpointError} - {kind}
    assert not any(issubclass(kind, other) for other in others)


def test_a_message_is_one_line_whatever_it_quotes():
    """Line breaks, escape sequences of terminals, characters that turn the direction; and no page of text."""
    assert str(ConfigError("a key\r\n\x1b[2J\u2028\u202e:  unknown\n")) == r"a key \x1b[2J \u202e:  unknown"
    text = str(DataError("first " + "x" * 100_000 + " last"))
    assert len(text) < 2000 and text.startswith("first ") and text.endswith(" last")


def test_errors_of_the_program_are_not_the_users():
    assert not issubclass(ValueError, MostError)
    assert not issubclass(MostError, (ValueError, OSError, RuntimeError))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no such key\n    full_key: a.b\n"), "no such key"),
        (RuntimeError("\n  CUDA error\nframe #0"), "CUDA error"),
        (FileNotFoundError(2, "No such file or directory", "a.nemo"), "No such file or directory: a.nemo"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_the_first_line_of_an_error_or_its_type(error, line):
    assert first_line(error) == line
