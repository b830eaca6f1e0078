"""Variants of equal cost: the MLP width at which a configuration costs what the baseline costs."""

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
    """The override that gives a variant the cost ``target``; none if it has that cost already.

    Cost is linear in the width of an MLP, so the costs at two widths determine the width.

    Args:
        configure: further overrides -> the variant's configuration.
        variant: its name, for errors.

    Raises:
        ConfigError: the width does not change the cost, or no multiple of ``budget.multiple`` is within the tolerance.
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
            f"variant {variant}: {override} gives {reached:,.0f} {budget.match}, must be within"
            f" budget.tolerance={budget.tolerance:g} of the baseline's {target:,.0f}"
        )
    return [override]
