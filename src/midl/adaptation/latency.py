"""Latency budgets: what every way to run a layer takes on the clock, and the plan that makes the whole model faster."""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from midl.adaptation.blocks import Block
from midl.adaptation.plan import (
    ACTIVE,
    LIGHT_ALONE,
    LIGHT_SHARES,
    ActiveLimit,
    Choice,
    Plan,
    cheaper_than_dense,
    choose,
    largest_budget,
)
from midl.adaptation.replace import make_replacements, replaced
from midl.errors import MIDLError

__all__ = ["Timing", "choose_by_latency", "compare_latency", "time_choices"]

# Calls of a turn: the first brings the caches into the state that a model called again and again finds.
_UNTIMED, _TIMED = 1, 2
# Per trial: turns of both sides, at least and at most, and seconds after which no more begin.
_TURNS, _MOST_TURNS, _SECONDS = 2, 30, 1.0
# The same where the whole model is what counts.
_WHOLE_TURNS, _WHOLE_MOST_TURNS, _WHOLE_SECONDS = 5, 60, 3.0
# Plans that are measured for one budget, and what counts as meeting it: timings differ by this much anyway.
_PLANS = 6
_NOISE, _ABOVE = 0.03, 0.05


class Timing(NamedTuple):
    """Nanoseconds of one call of the model, and within it of the layers that were watched."""

    whole: float
    layers: dict[str, float]


def clock(wall: bool) -> int:
    """Return nanoseconds: by the clock on the wall, or of processor time of this thread, which others cannot take."""
    return time.perf_counter_ns() if wall else time.thread_time_ns()


def choose_by_latency(
    model: nn.Module, layers: Mapping[str, nn.Module], blocks: Mapping[str, Block],
    choices: Mapping[str, Sequence[Choice]], inputs: Any, budget: float, *, uniform: bool = False,
    limit: ActiveLimit | None = None,
) -> Plan:  # fmt: skip
    """Return the plan that loses least among those with which one call takes ``1 / budget`` of the dense model's time.

    Times of layers need not add up to that of a model, so every plan is measured; while it misses the budget, or is
    faster than it need be, the next one is made for a budget corrected in proportion.

    Args:
        model: dense; left as it was.
        layers: the layers of ``choices``, by name.
        blocks: the FFNs of ``choices``, by name.
        choices: the ways to run each of them, dense first.
        inputs: of the size that will be served.
        budget: the dense model's time, divided by that wanted. Met is what is at most 3 % slower.
        uniform, limit: as for :func:`midl.adaptation.plan.choose`.

    Raises:
        MIDLError: no plan is as fast; the message says how fast the fastest one is.
    """
    with _serving(model):
        call = _bind(model, inputs)
        timed, total = time_choices(model, layers, blocks, choices, call)
        fastest = largest_budget(timed, total, uniform=uniform)
        met: list[Plan] = []
        nearest, target, missed, enough = 0.0, budget, 0.0, fastest
        for i in range(_PLANS if fastest > 1 else 0):
            target = fastest if i == _PLANS - 1 and not met else min(target, fastest)
            chosen = choose(timed, total, target, uniform=uniform, limit=limit)
            before, after = compare_latency(model, make_replacements(layers, blocks, chosen), call)
            ratio = before.whole / after.whole
            nearest = max(nearest, ratio)
            if ratio >= budget * (1 - _NOISE):
                met.append(Plan(chosen, timed, before.whole / 1e9, after.whole / 1e9))
                enough = target
            else:
                missed = target
            if budget * (1 - _NOISE) <= ratio <= budget * (1 + _ABOVE) or missed >= enough:
                break
            target *= budget / ratio
            if met and not missed < target < enough:
                target = (missed + enough) / 2
    if met:
        return min(met, key=lambda plan: sum(choice.error for choice in plan.chosen.values()))
    if nearest <= 1:
        wanted = "a FLOPs budget or other latency_inputs: on these no plan is faster than the dense model"
    else:
        outside = 1 - sum(ways[0].cost for ways in timed.values()) / total
        wanted = f"at most {int(1000 * nearest) / 1000:g}: {outside:.1%} of the time is outside the layers that can be"
        wanted += " converted"
    raise MIDLError(f"adapt: budget={budget:g} cannot be met on this machine, expected {wanted}")


def time_choices(
    model: nn.Module, layers: Mapping[str, nn.Module], blocks: Mapping[str, Block],
    choices: Mapping[str, Sequence[Choice]], call: Callable[[], Any],
) -> tuple[dict[str, list[Choice]], int]:  # fmt: skip
    """Return the choices that are faster than the dense layer, with their times, and the dense model's time.

    Layers are timed where they work, in one call of the model: with the inputs, memory formats and caches that they
    find there. A trial gives all layers the same light path and density, and takes turns with the dense model; what is
    kept is the ratio to the dense layer in the same trial. Times of other densities lie on the lines between.
    """
    ends = {name: blocks[name].ends() if name in blocks else ([name], name) for name in choices}
    dense: dict[str, list[float]] = {name: [] for name in choices}
    ratios: dict[str, dict[tuple[float, float], float]] = {name: {} for name in choices}
    wholes = []
    for share, active in [*itertools.product(LIGHT_SHARES, (*ACTIVE, 1.0)), *((share, 0.0) for share in LIGHT_ALONE)]:
        trial = {name: nearest for name, ways in choices.items() if (nearest := _nearest(ways, share, active))}
        if not trial:
            continue
        before, after = compare_latency(model, make_replacements(layers, blocks, trial), call, ends)
        wholes.append(before.whole)
        for name, taken in before.layers.items():
            dense[name].append(taken)
        for name, choice in trial.items():
            ratios[name][choice.light_share, choice.active] = after.layers[name] / before.layers[name]
    timed = {}
    for name, ways in choices.items():
        own = round(statistics.median(dense[name])) if dense[name] else 0
        found = [dataclasses.replace(ways[0], nanoseconds=own)]
        for choice in ways[1:]:
            ratio = _interpolate(ratios[name], choice)
            found.append(dataclasses.replace(choice, nanoseconds=max(1, round(own * ratio))))
        timed[name] = cheaper_than_dense(found)
    whole = round(statistics.median(wholes)) if wholes else 1
    return timed, max(whole, sum(ways[0].cost for ways in timed.values()))


def compare_latency(
    model: nn.Module,
    replacements: Mapping[int, nn.Module],
    call: Callable[[], Any],
    ends: Mapping[str, tuple[Sequence[str], str]] | None = None,
) -> tuple[Timing, Timing]:
    """Return the times of the model as it is and with ``replacements``, in turns, by their medians.

    With one thread they are its processor time: a busy machine takes its share from calls of some lengths only.

    Args:
        model: in evaluation mode.
        replacements: id of a module to the one that takes its place.
        call: calls the model.
        ends: of layers to watch: the names of the modules of which the first one called starts the clock, and that of
            the one that stops it. Without any the model is called as a user does, without hooks.
    """
    for module in replacements.values():
        module.eval()
    swap = functools.partial(replaced, model, replacements)
    sides = [_Side(call, model, ends or {}), _Side(call, model, ends or {}, swap)]
    turns, most, seconds = (
        (_TURNS, _MOST_TURNS, _SECONDS) if ends else (_WHOLE_TURNS, _WHOLE_MOST_TURNS, _WHOLE_SECONDS)
    )
    collecting = gc.isenabled()
    gc.disable()  # a collection inside one side's call would be charged to it
    try:
        start = clock(wall=True)
        for turn in range(most):
            if turn >= turns and clock(wall=True) - start > 1e9 * seconds:
                break
            for side in sides if turn % 2 else sides[::-1]:
                side.take_turn()
    finally:
        if collecting:
            gc.enable()
    return sides[0].timing(), sides[1].timing()


class _Side:
    """One of two states of a model: as it is, or inside ``swap``; collects the times of its calls."""

    def __init__(
        self, call: Callable[[], Any], model: nn.Module, ends: Mapping[str, tuple[Sequence[str], str]],
        swap: Callable[[], Any] = nullcontext,
    ) -> None:  # fmt: skip
        self.call, self.model, self.ends, self.swap = call, model, ends, swap
        self.cuda = any(t.is_cuda for t in model.parameters())
        self.wall = self.cuda or torch.get_num_threads() > 1
        self.spans = {name: _Span(self.now) for name in ends}
        self.timings: list[Timing] = []

    def now(self) -> int:
        if self.cuda:
            torch.cuda.synchronize()
        return clock(self.wall)

    def take_turn(self) -> None:
        """Call the model a few times."""
        with self.swap(), self._watched():
            for i in range(_UNTIMED + _TIMED):
                start = self.now()
                self.call()
                timing = Timing(self.now() - start, {name: span.take() for name, span in self.spans.items()})
                if i >= _UNTIMED:
                    self.timings.append(timing)

    def timing(self) -> Timing:
        return Timing(
            statistics.median(timing.whole for timing in self.timings),
            {name: statistics.median(timing.layers[name] for timing in self.timings) for name in self.spans},
        )

    @contextmanager
    def _watched(self) -> Iterator[None]:
        handles: list[RemovableHandle] = []
        for name, (first, last) in self.ends.items():
            span = self.spans[name]
            handles += [self.model.get_submodule(one).register_forward_pre_hook(span.begin) for one in first]
            handles.append(self.model.get_submodule(last).register_forward_hook(span.end))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Span:
    """The time from the first of a layer's modules to the end of the last, summed over a call of the model."""

    def __init__(self, now: Callable[[], int]) -> None:
        self.now = now
        self.total, self.start = 0, -1

    def begin(self, *_: Any) -> None:
        if self.start < 0:
            self.start = self.now()

    def end(self, *_: Any) -> None:
        self.total += self.now() - self.start
        self.start = -1

    def take(self) -> int:
        """Return the total, at least 1, and begin anew."""
        total, self.total, self.start = self.total, 0, -1
        return max(1, total)


def _nearest(ways: Sequence[Choice], share: float, active: float) -> Choice | None:
    same = [way for way in ways[1:] if way.light_share == share and (way.active > 0) == (active > 0)]
    return min(same, key=lambda way: abs(way.active - active), default=None)


def _interpolate(measured: Mapping[tuple[float, float], float], choice: Choice) -> float:
    """Return what a choice takes relative to dense, on the line through its two neighbours in density."""
    points = sorted((active, value) for (share, active), value in measured.items() if share == choice.light_share)
    if len(points) == 1:
        return points[0][1]
    i = max(1, next((j for j, (active, _) in enumerate(points) if active >= choice.active), len(points) - 1))
    (low, below), (high, above) = points[i - 1], points[i]
    return below + (choice.active - low) / (high - low) * (above - below)


def _bind(model: nn.Module, inputs: Any) -> Callable[[], Any]:
    """Return a call of the model on ``inputs``, which are moved to where it is."""
    place = next((t.device for t in model.parameters()), torch.device("cpu"))
    if isinstance(inputs, Mapping):
        return functools.partial(
            model, **{name: x.to(place) if isinstance(x, Tensor) else x for name, x in inputs.items()}
        )
    return functools.partial(model, inputs.to(place))


@contextmanager
def _serving(model: nn.Module) -> Iterator[None]:
    """Evaluate ``model`` as one that serves does, torch's fused transformer kernels included."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
