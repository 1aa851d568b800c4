"""allocate: one budget for the whole model, divided among its layers where it does most good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from midl.errors import MIDLError

__all__ = ["Option", "allocate"]

_STEPS = 10_000


class Option(NamedTuple):
    """One way to run a layer: what it costs and the error it adds to the model's output."""

    cost: int
    error: float


def allocate(options: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """Return which option to take for each layer, so that the errors add up to the least at ``budget`` or below.

    A multiple-choice knapsack, solved by dynamic programming over the cost. For a budget up to 10,000 the choice is
    exact. Above, costs are rounded up to steps of budget / 10,000, so the budget is met and the error is at most that
    of the best choice for a budget smaller by one step per layer (0.01 % of the budget each).

    >>> allocate([[Option(10, 0.0), Option(4, 0.3)], [Option(10, 0.0), Option(4, 0.1)]], budget=14)
    [0, 1]

    Args:
        options: of each layer, at least one; costs are not negative.
        budget: total cost allowed.

    Raises:
        MIDLError: even the cheapest options cost more than the budget.
    """
    cheapest = sum(min(option.cost for option in layer) for layer in options)
    if cheapest > budget:
        raise MIDLError(f"allocate: budget={budget}, expected at least {cheapest}, the sum of the cheapest options")
    step = max(1, -(-budget // _STEPS))
    size = budget // step + 1
    best = torch.zeros(size, dtype=torch.float64)
    choices = []
    for layer in options:
        table = torch.full((len(layer), size), torch.inf, dtype=torch.float64)
        for i, option in enumerate(layer):
            cost = -(-option.cost // step)
            if cost < size:
                table[i, cost:] = best[: size - cost] + option.error
        best, choice = table.min(0)
        choices.append(choice)
    if not best.isfinite().any():  # only rounding stands in the way of the cheapest options
        return [min(range(len(layer)), key=lambda i, layer=layer: layer[i]) for layer in options]  # type: ignore[misc]
    left, chosen = size - 1, []
    for layer, choice in zip(reversed(options), reversed(choices), strict=True):
        chosen.append(int(choice[left]))
        left -= -(-layer[chosen[-1]].cost // step)
    return chosen[::-1]
