"""One base catches every error a user can cause, and nothing else."""

import pytest

from megatron_most.errors import CheckpointError, ConfigError, DataError, MostError


@pytest.mark.parametrize("kind", [ConfigError, DataError, CheckpointError])
def test_each_kind_is_a_most_error_and_no_other_kind(kind):
    with pytest.raises(MostError, match="a.yaml: line"):
        raise kind("a.yaml: line")
    others = {ConfigError, DataError, CheckpointError} - {kind}
    assert not any(issubclass(kind, other) for other in others)


def test_errors_of_the_program_are_not_the_users():
    assert not issubclass(ValueError, MostError)
    assert not issubclass(MostError, (ValueError, OSError, RuntimeError))
