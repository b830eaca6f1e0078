"""An error on one rank ends the job on every rank and is reported once."""

from __future__ import annotations

import torch.distributed as dist

from megatron_most import parallel
from megatron_most.errors import DataError
from megatron_most.parallel import on_rank_zero, together
from tests.distributed.harness import run_ranks
from tests.distributed.tiny import tiny_config


def outcomes(failing: list[int]) -> str:
    parallel.initialize(tiny_config().parallel, 1)

    def action() -> int:
        if dist.get_rank() in failing:
            raise DataError(f"rank {dist.get_rank()} has no data")
        return 10 * dist.get_rank()

    try:
        return f"returned {together(action)}"
    except DataError as error:
        return f"told: {error}"
    except SystemExit as leaving:
        return f"left with {leaving.code}"


def test_together() -> None:
    assert run_ranks(2, outcomes, []) == ["returned 0", "returned 10"]
    assert run_ranks(2, outcomes, [1]) == ["left with 1", "told: rank 1 has no data"]
    assert run_ranks(2, outcomes, [0, 1]) == ["told: rank 0 has no data", "left with 1"]


def result_of_rank_zero() -> int:
    parallel.initialize(tiny_config().parallel, 1)
    return on_rank_zero(lambda: dist.get_rank() + 42)


def test_on_rank_zero_gives_every_rank_its_result() -> None:
    assert run_ranks(2, result_of_rank_zero) == [42, 42]
