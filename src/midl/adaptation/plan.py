"""The plan of an adaptation: which layers become sparse, from which start, at which density."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from midl.adaptation.allocate import Option, allocate
from midl.adaptation.between import fill_grid, fill_line
from midl.adaptation.calibrate import Moments, weight_of
from midl.adaptation.initialise import Start, initialise, light_alone
from midl.adaptation.light_path import fit_light_path, middle_rank
from midl.adaptation.measure import simulate
from midl.adaptation.sensitivity import sample_outputs
from midl.config import layer_macs, num_active_groups
from midl.conversion.convert import own_parameters, shared_parameters
from midl.conversion.families import family_of, why_not
from midl.errors import MIDLError
from midl.layers import MIDLayer

__all__ = [
    "ActiveLimit",
    "Choice",
    "Plan",
    "cheaper_than_dense",
    "choose",
    "choose_by_flops",
    "find_layers",
    "largest_budget",
    "list_choices",
]

# Light paths, as shares of the dense layer's multiply-adds, and active fractions at which every layer is measured;
# between two fractions the error is interpolated in steps of _STEP.
LIGHT_SHARES = (0.03, 0.06, 0.1, 0.16, 0.25)
ACTIVE = (0.05, 0.15, 0.3, 0.5, 0.75)
_STEP = 0.01
# Shares of light paths that are tried alone, without any full path.
LIGHT_ALONE = (0.08, 0.12, 0.18, 0.23, 0.29, 0.36, 0.43, 0.52, 0.62, 0.75)
# Convolutions compute channels in blocks of 8: other ranks cost them a tenth of their speed and more. Matrix products
# lose little, and narrow layers would lose choices.
_CHANNELS = 8
# Errors are relative: what an active neuron may cost where all of them are too many.
_LEAST_PRICE, _HIGHEST_PRICE = 1e-12, 1e3


@dataclasses.dataclass(frozen=True)
class Choice:
    """A way to run one layer: dense, or from a start at a density.

    Attributes:
        flops: on the first batch.
        error: relative output error of the model with this layer alone made so.
        start: a :class:`midl.adaptation.Start`, for a block a BlockStart; None: dense.
        active: fraction of groups on the full path; 0: the light path alone.
        light_share: multiply-adds that code, light path and gate were allowed, as a share of the dense layer's.
        nanoseconds: on the inputs of a latency budget; None: the budget is one of FLOPs.
    """

    flops: int
    error: float
    start: Any = None
    active: float = 1.0
    light_share: float = 0.0
    nanoseconds: int | None = None

    @property
    def cost(self) -> int:
        """What the budget counts."""
        return self.flops if self.nanoseconds is None else self.nanoseconds


@dataclasses.dataclass(frozen=True)
class Plan:
    """What becomes of every layer, and from what it was chosen.

    Attributes:
        chosen: the choice for each layer.
        choices: those that cost less than the dense layer, and the dense one first.
        latency_before: seconds of one call of the dense model; None: the budget is one of FLOPs.
        latency_after: the same with the plan.
    """

    chosen: dict[str, Choice]
    choices: dict[str, list[Choice]]
    latency_before: float | None = None
    latency_after: float | None = None


@dataclasses.dataclass(frozen=True)
class ActiveLimit:
    """At most this share of the neurons of some layers may be active; those of a dense layer all are.

    Args:
        share: of the neurons.
        neurons: of each layer; hidden units of a block.
    """

    share: float
    neurons: Mapping[str, int]

    def active(self, plan: Mapping[str, Choice]) -> float:
        """Return the share of the neurons that is active in a plan."""
        count = sum(self.neurons[name] * choice.active for name, choice in plan.items())
        return count / sum(self.neurons[name] for name in plan)

    def met_by(self, plan: Mapping[str, Choice]) -> bool:
        """Return whether a plan keeps to it."""
        return self.active(plan) <= self.share + 1e-9


# What a report names even though it has no MID-L counterpart.
_MULTIPLIES = (
    MIDLayer, nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear, nn.RNNBase, nn.MultiheadAttention,
)  # fmt: skip


def find_layers(
    model: nn.Module, group_size: int, filter_fn: Callable[[nn.Module, str], bool] | None
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the layers that can be converted, by name, and why each other layer with a product of weights cannot."""
    shared = shared_parameters(model)
    layers: dict[str, nn.Module] = {}
    reasons: dict[str, str] = {}
    for name, module in own_parameters(model):
        if family_of(module) is None and not isinstance(module, _MULTIPLIES):
            continue
        reason = why_not(module, shared)
        if reason is None:
            n = weight_of(module).shape[0]
            if n % group_size:
                reason = f"group_size={group_size} does not divide its {n} neurons"
            elif n == group_size:
                reason = f"group_size={group_size} leaves one group to choose from"
            elif filter_fn is not None and not filter_fn(module, name):
                reason = "filter_fn returned False"
        if reason is None:
            layers[name] = module
        else:
            reasons[name] = reason
    return layers, reasons


def list_choices(
    model: nn.Module,
    name: str,
    layer: nn.Module,
    moments: Moments,
    batches: Sequence[Any],
    expected: Sequence[Tensor],
    *,
    rows: int,
    group_size: int,
    seed: int,
    compare_rows: bool = False,
    alone: bool = True,
) -> list[Choice]:
    """Return the ways to run one layer with what each costs and loses, dense first.

    Args:
        model: dense; left as it was.
        name: of the layer.
        layer: the layer.
        moments: its calibration.
        batches: inputs to fit and measure on.
        expected: the model's outputs on the first of them, as many as are to be measured on.
        rows: rows (positions) of the layer on the first batch, in which the costs are counted.
        group_size: divides the layer's width.
        seed: of the random choices.
        compare_rows: as for :func:`midl.adaptation.fit_gate`.
        alone: list light paths without any full path too.
    """
    weight, bias = weight_of(layer), getattr(layer, "bias", None)
    n, fan_in = weight.shape
    principal = moments.principal_outputs()
    middle = fit_light_path(weight, principal, middle_rank(weight))
    sampled = sample_outputs(model, name, layer, middle, batches, seed=seed)
    choices = [Choice(2 * rows * n * fan_in, 0.0)]
    if len(sampled.full) < 8 or not sampled.weight.any():  # what cannot be judged stays dense
        return choices

    def measure(start: Start, active: float) -> float:
        return simulate(model, {name: layer}, {name: (start, active)}, batches[: len(expected)], expected)

    starts: dict[float, Start] = {}
    for share in LIGHT_SHARES:
        light_macs = int(share * n * fan_in)
        if light_macs >= n + fan_in:
            starts[share] = initialise(
                weight, bias, principal, sampled, group_size=group_size, light_macs=light_macs,
                compare_rows=compare_rows,
            )  # fmt: skip
    choices += _list_sparse(starts, n, fan_in, measure, rows)
    if alone:
        paths: dict[float, Start] = {}
        for share in LIGHT_ALONE:
            path = light_alone(
                weight, bias, principal, sampled, group_size=group_size, light_macs=int(share * n * fan_in),
                multiple=_CHANNELS if isinstance(layer, nn.Conv2d) else 1,
            )  # fmt: skip
            if path is not None:
                paths[share] = path
        choices += _list_alone(paths, measure, rows)
    return choices


def _list_sparse(
    starts: Mapping[float, Start], n: int, fan_in: int, measure: Callable[[Start, float], float], rows: int
) -> list[Choice]:
    """Return the choices with a gate, from starts by their light share."""
    choices: list[Choice] = []
    listed = list(starts.values())
    num_groups = n // listed[0].group_size if listed else 1
    counts = [num_active_groups(active, num_groups) for active in ACTIVE]
    distinct = sorted(set(counts))  # where groups are few, several fractions are the same choice
    fractions = [ACTIVE[counts.index(k)] for k in distinct]
    left_out = [[start.lost(active) for active in fractions] for start in listed]
    found = fill_grid(left_out, lambda i, j: measure(listed[i], fractions[j]))
    for (share, start), at_distinct in zip(starts.items(), found, strict=True):
        errors = [at_distinct[distinct.index(k)] for k in counts]
        if not all(map(math.isfinite, errors)):  # overflow in half precision
            continue

        def macs(k: int, start: Start = start) -> int:
            return layer_macs(fan_in, n, start.rank, num_selected=k, group_size=start.group_size, gate=start.gate)

        choices += [
            dataclasses.replace(choice, light_share=share)
            for choice in interpolate(start, errors, num_groups, macs, rows)
        ]
    return choices


def _list_alone(paths: Mapping[float, Start], measure: Callable[[Start, float], float], rows: int) -> list[Choice]:
    """Return the choices without any full path, from starts by their light share; several may have one rank."""
    by_rank = {path.rank: path for path in paths.values()}
    ranked = [by_rank[rank] for rank in sorted(by_rank)]
    found = fill_line([path.lost(0) for path in ranked], lambda i: measure(ranked[i], 0.0))
    errors = {path.rank: error for path, error in zip(ranked, found, strict=True)}
    return [
        Choice(2 * rows * path.light_macs, errors[path.rank], path, 0.0, share)
        for share, path in paths.items()
        if math.isfinite(errors[path.rank])
    ]


def interpolate(
    start: Any, errors: Sequence[float], num_groups: int, macs: Callable[[int], int], rows: int
) -> list[Choice]:
    """Return the choices between the measured fractions; with every group active the error is 0.

    Args:
        start: a :class:`midl.adaptation.Start`, or what is one for a block of layers.
        errors: at each of ``ACTIVE``.
        num_groups: N.
        macs: from groups selected to multiply-adds per row.
        rows: rows of the layer in which costs are counted.
    """
    known, values = (*ACTIVE, 1.0), (*errors, 0.0)
    choices: dict[int, Choice] = {}
    for step in range(round(ACTIVE[0] / _STEP), round(1 / _STEP)):
        k = num_active_groups(step * _STEP, num_groups)
        active = min(1.0, max(ACTIVE[0], k / num_groups))
        i = max(j for j, fraction in enumerate(known[:-1]) if fraction <= active + 1e-9)
        part = (active - known[i]) / (known[i + 1] - known[i])
        error = values[i] + part * (values[i + 1] - values[i])
        choices[k] = Choice(2 * rows * macs(k), error, start, k / num_groups)
    return list(choices.values())


def choose_by_flops(
    choices: Mapping[str, Sequence[Choice]], dense_flops: int, budget: float, *, uniform: bool = False,
    limit: ActiveLimit | None = None,
) -> Plan:  # fmt: skip
    """Return the plan that loses least with ``dense_flops / budget`` for the whole model; arguments as for ``choose``.

    Raises:
        MIDLError: the budget, or the limit with it, cannot be met; the message says the nearest that can.
    """
    cheaper = {name: cheaper_than_dense(found) for name, found in choices.items()}
    largest = largest_budget(cheaper, dense_flops, uniform=uniform)
    if budget > largest:
        raise MIDLError(
            f"adapt: budget={budget:g} cannot be met, expected at most {int(1000 * largest) / 1000:g}: "
            f"{_elsewhere(cheaper, dense_flops) / dense_flops:.1%} of the FLOPs are outside the layers that can be "
            "converted"
        )
    return Plan(choose(cheaper, dense_flops, budget, uniform=uniform, limit=limit), cheaper)


def choose(
    choices: Mapping[str, Sequence[Choice]], total: int, budget: float, *, uniform: bool = False,
    limit: ActiveLimit | None = None,
) -> dict[str, Choice]:  # fmt: skip
    """Return the choice for each layer that together lose least with ``total / budget`` for the whole model.

    Args:
        choices: of each layer, dense first.
        total: cost of the whole dense model.
        budget: ratio of the whole model; at most :func:`largest_budget`.
        uniform: let all layers have the same density and share of light path, as far as their groups allow.
        limit: how many neurons may be active. The plan is then one of those that lose least for what they cost and
            keep active, which need not be the very best.

    Raises:
        MIDLError: no plan meets the limit; the message says the nearest that can.
    """
    left = total / budget - _elsewhere(choices, total)
    # At the largest budget the cheapest plan must not be lost to rounding.
    if uniform:
        plans = _list_uniform(choices)
        left = max(left, min(map(_cost, plans)))
        named = [dict(zip(choices, plan, strict=True)) for plan in plans if _cost(plan) <= left]
        met = [plan for plan in named if limit is None or limit.met_by(plan)]
        if limit is not None and not met:
            raise _unmet(limit, min(map(limit.active, named)))
        return min(met, key=lambda plan: sum(choice.error for choice in plan.values()))
    left = max(left, sum(min(choice.cost for choice in found) for found in choices.values()))

    def cheapest(price: float) -> dict[str, Choice]:
        """Return the choices of least error where an active neuron has a price in errors."""
        options = [
            [Option(c.cost, c.error + (price * limit.neurons[name] * c.active if limit else 0)) for c in found]
            for name, found in choices.items()
        ]
        return {name: found[i] for (name, found), i in zip(choices.items(), allocate(options, int(left)), strict=True)}

    plan = cheapest(0.0)
    if limit is None or limit.met_by(plan):
        return plan
    return _lower_active(limit, cheapest)


def _lower_active(limit: ActiveLimit, cheapest: Callable[[float], dict[str, Choice]]) -> dict[str, Choice]:
    """Return the plan of the least price of an active neuron, to a thousandth, that meets the limit."""
    low = high = _LEAST_PRICE
    while not limit.met_by(plan := cheapest(high)):
        if high > _HIGHEST_PRICE:
            raise _unmet(limit, limit.active(plan))
        low, high = high, 4 * high
    while high > low * 1.001:
        middle = math.sqrt(low * high)
        tried = cheapest(middle)
        if limit.met_by(tried):
            high, plan = middle, tried
        else:
            low = middle
    return plan


def _unmet(limit: ActiveLimit, least: float) -> MIDLError:
    return MIDLError(
        f"adapt: max_active={limit.share:g} cannot be met, expected at least {math.ceil(1000 * least) / 1000:g}, which "
        "the layers that cannot do with less have active"
    )


def largest_budget(choices: Mapping[str, Sequence[Choice]], total: int, *, uniform: bool = False) -> float:
    """Return the largest ratio that :func:`choose`, with the same arguments, can meet."""
    plans = _list_uniform(choices) if uniform else [[min(found, key=lambda c: c.cost) for found in choices.values()]]
    return total / (_elsewhere(choices, total) + min(map(_cost, plans)))


def cheaper_than_dense(found: Sequence[Choice]) -> list[Choice]:
    """Return the dense choice, which comes first, and those that cost less."""
    return [found[0], *(choice for choice in found[1:] if choice.cost < found[0].cost)]


def _elsewhere(choices: Mapping[str, Sequence[Choice]], total: int) -> int:
    return total - sum(found[0].cost for found in choices.values())


def _cost(plan: Sequence[Choice]) -> int:
    return sum(choice.cost for choice in plan)


def _list_uniform(choices: Mapping[str, Sequence[Choice]]) -> list[list[Choice]]:
    """Return the plans in which every layer has the same light share and, up to rounding down, the same density.

    A layer without a choice that fits stays dense.
    """
    plans = [
        [next((c for c in found if (c.active, c.light_share) == (0, share)), found[0]) for found in choices.values()]
        for share in LIGHT_ALONE
    ]
    for share in LIGHT_SHARES:
        for step in range(round(ACTIVE[0] / _STEP), round(1 / _STEP)):
            at_most = step * _STEP + 1e-9
            plans.append(
                [
                    max(
                        (c for c in found[1:] if c.light_share == share and c.active <= at_most),
                        key=lambda c: c.active,
                        default=found[0],
                    )
                    for found in choices.values()
                ]
            )
    return plans
