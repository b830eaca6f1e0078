"""Variants of equal cost: the width that makes a configuration spend what the baseline spends."""

from __future__ import annotations

from collections.abc import Callable

from megatron_most.config import RunConfig
from megatron_most.errors import ConfigError
from megatron_most.model import count_parameters
from megatron_most.planning import train_flops_per_token
from megatron_most.sweep.spec import BudgetConfig

COSTS: dict[str, Callable[[RunConfig], float]] = {
    "active_parameters": lambda config: float(count_parameters(config)["active"]),
    "flops": train_flops_per_token,
}


def matched_width(
    budget: BudgetConfig, target: float, configure: Callable[[list[str]], RunConfig], variant: str
) -> list[str]:
    """The override that gives a variant the cost ``target``; none when it has that already.

    Cost is linear in the width of an MLP, so two widths tell the third.

    Args:
        configure: the variant's configuration with further overrides.
        variant: its name, for errors.

    Raises:
        ConfigError: the width does not change the cost, or no legal width comes within the tolerance.
    """
    cost = COSTS[budget.match]
    mine = cost(configure([]))
    if mine == target:
        return []
    at_one, at_two = (cost(configure([f"{budget.width}={steps * budget.multiple}"])) for steps in (1, 2))
    if at_two == at_one:
        raise ConfigError(f"variant {variant}: budget.width={budget.width!r}: does not change its {budget.match}")
    steps = max(1, round(1 + (target - at_one) / (at_two - at_one)))
    override = f"{budget.width}={steps * budget.multiple}"
    reached = cost(configure([override]))
    if abs(reached - target) > budget.tolerance * target:
        raise ConfigError(
            f"variant {variant}: {override} gives {reached:,.0f} {budget.match}, the baseline has {target:,.0f}:"
            f" further off than budget.tolerance={budget.tolerance:g}"
        )
    return [override]
