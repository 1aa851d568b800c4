"""set_active: the budget of a whole model, as a fraction of active groups or as a FLOPs ratio."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from midl.analysis.flops import count_flops
from midl.checks import check_module
from midl.config import check_active, num_active_groups
from midl.conversion.families import family_of_layer
from midl.errors import MIDLError
from midl.layers import MIDLayer

__all__ = ["set_active", "spread_active"]


def set_active(
    model: nn.Module, active: float | None = None, *, flops_ratio: float | None = None, example_inputs: Any = None
) -> None:
    """Set how much of every MID-L layer in ``model`` is active, the same for every input; the weights stay.

    Thresholds go: they belong to the budget they were calibrated for (:func:`midl.adaptation.calibrate_threshold`).

    Give either the fraction of groups, the same for every layer, or what the whole model should need. For a FLOPs ratio
    the layers keep their order: every layer's odds ``active / (1 - active)`` are multiplied by the same factor, the
    largest that meets the ratio, so that an allocation by :func:`midl.adapt` survives and a later call can go back up.

    >>> import torch
    >>> from midl import MIDLinear
    >>> layer = MIDLinear(64, 128)
    >>> set_active(layer, 0.3)
    >>> layer.num_selected
    38
    >>> model = nn.Sequential(layer, nn.ReLU(), nn.Linear(128, 10))
    >>> set_active(model, flops_ratio=1.5, example_inputs=torch.zeros(1, 64))
    >>> 2 * (64 * 128 + 128 * 10) / count_flops(model, torch.zeros(1, 64)) >= 1.5
    True

    Args:
        model: contains, or is, a MID-L layer.
        active: in (0, 1].
        flops_ratio: FLOPs of the dense model, divided by those that ``model`` is to need at most; above 0.
        example_inputs: for ``flops_ratio``: a tensor, a tuple of arguments or a dict of keyword arguments.

    Raises:
        MIDLError: an argument out of range, both or neither given, a model without MID-L layers, or a ratio that cannot
            be met; the message names the nearest that can. The model is then as it was.
    """
    check_module("set_active", model)
    if active is not None and flops_ratio is not None:
        raise MIDLError(f"set_active: active={active!r} and flops_ratio={flops_ratio!r}, expected one of them")
    if flops_ratio is None:
        check_active("set_active", active)  # type: ignore[arg-type]
    layers = [m for m in model.modules() if isinstance(m, MIDLayer)]
    if not layers:
        raise MIDLError(f"set_active: the {type(model).__name__} has no MID-L layers")
    if flops_ratio is None:
        for layer in layers:
            layer.active = active  # type: ignore[assignment]
        return
    if not isinstance(flops_ratio, (int, float)) or isinstance(flops_ratio, bool) or not flops_ratio > 0:
        raise MIDLError(f"set_active: flops_ratio={flops_ratio!r}, expected a number above 0")
    if example_inputs is None:
        raise MIDLError("set_active: flops_ratio without example_inputs, expected inputs to count FLOPs with")
    _meet_ratio(model, layers, flops_ratio, example_inputs)


def spread_active(layers: Sequence[MIDLayer], mean: float) -> None:
    """Set the layers' ``active`` to ``mean`` on average, their odds multiplied by a common factor.

    Layers with equal ``active`` all get ``mean``; those that select nothing stay so and do not count.

    >>> from midl import MIDLinear
    >>> layers = [MIDLinear(8, 64, rank=2, active=a) for a in (0.2, 0.6)]
    >>> spread_active(layers, 0.2)
    >>> [round(layer.active, 3) for layer in layers]
    [0.074, 0.326]
    """
    layers = [layer for layer in layers if layer.active]
    if not layers:
        return
    starts = [layer.active for layer in layers]
    factor = _bisect(lambda c: sum(_scaled(a, c) for a in starts) / len(starts) <= mean)
    for layer, start in zip(layers, starts, strict=True):
        layer.active = mean if max(starts) == min(starts) else _scaled(start, factor)


# An active fraction of exactly 1 has no odds; it counts as just below.
_ALL = 1 - 1e-6


def _scaled(active: float, factor: float) -> float:
    active = min(active, _ALL)
    return active * factor / (1 - active + active * factor)


def _bisect(fits: Callable[[float], bool]) -> float:
    """Return the largest factor that fits, if a smaller one always fits too."""
    low, high = -40.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(math.exp(middle)) else (low, middle)
    return math.exp(low)


def _meet_ratio(model: nn.Module, layers: Sequence[MIDLayer], ratio: float, example_inputs: Any) -> None:
    costs = _Costs(model, layers, example_inputs)
    budget = costs.dense / ratio
    starts = [layer.active for layer in layers]

    def selected(factor: float) -> list[int]:
        return [num_active_groups(_scaled(a, factor), x.num_groups) for a, x in zip(starts, layers, strict=True)]

    least = costs.total([min(1, x.num_selected) for x in layers])
    if least > budget:
        raise MIDLError(
            f"set_active: flops_ratio={ratio:g} cannot be met, expected at most {costs.dense / least:.3f} "
            "(one active group in every layer that selects any)"
        )
    factor = _bisect(lambda c: costs.total(selected(c)) <= budget)
    for layer, start in zip(layers, starts, strict=True):
        layer.active = _scaled(start, factor)


class _Costs:
    """FLOPs of a model as a function of the groups that each layer selects, and those of its dense twin."""

    def __init__(self, model: nn.Module, layers: Sequence[MIDLayer], example_inputs: Any) -> None:
        self.fixed = [0.0] * len(layers)  # of each layer, whatever it selects
        self.per_group = [0.0] * len(layers)
        dense = [0.0] * len(layers)
        now = [0.0] * len(layers)
        # A layer that is called twice is counted twice.
        calls: list[tuple[int, tuple[Any, ...], dict[str, Any]]] = []

        def keep(index: int) -> Callable[..., None]:
            return lambda module, args, kwargs: calls.append((index, args, kwargs))

        handles = [x.register_forward_pre_hook(keep(i), with_kwargs=True) for i, x in enumerate(layers)]
        try:
            total = count_flops(model, example_inputs)
        finally:
            for handle in handles:
                handle.remove()
        for index, args, kwargs in calls:
            layer = layers[index]
            inputs = kwargs or args
            start = layer.config
            now[index] += count_flops(layer, inputs)
            dense[index] += count_flops(family_of_layer(layer).to_dense(layer), inputs)
            try:
                layer.active = 1 / layer.num_groups
                one = count_flops(layer, inputs)
                layer.active = 1.0
                every = count_flops(layer, inputs)
            finally:
                layer.config = start
            slope = (every - one) / max(1, layer.num_groups - 1)
            self.per_group[index] += slope
            self.fixed[index] += one - slope
        self.others = total - sum(now)
        self.dense = self.others + sum(dense)

    def total(self, selected: Sequence[int]) -> float:
        """Return the whole model's FLOPs with so many groups selected per layer."""
        return self.others + sum(f + p * k for f, p, k in zip(self.fixed, self.per_group, selected, strict=True))
