"""Interleaved timing: every contender once per round, in one process, compared round by round."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from midl.errors import MIDLError

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

__all__ = ["Sample", "Spread", "Timed", "geometric_mean", "interleave", "paired_ratio", "preemptions", "undisturbed"]

# Quartiles of fewer would be the extremes.
_FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample.

    >>> Spread.of([1.0, 2.0, 3.0, 4.0, 5.0])
    Spread(median=3.0, q1=2.0, q3=4.0)
    """

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of one value or more."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3)

    def to_dict(self) -> dict[str, float]:
        """Return the fields as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Timed:
    """What is timed: ``prepare(round)`` runs before the clock starts and ``call`` gets its result."""

    prepare: Callable[[int], Any]
    call: Callable[[Any], object]


class Sample(NamedTuple):
    """Seconds of one call and whether the scheduler took a processor away meanwhile."""

    seconds: float
    preempted: bool = False


def preemptions() -> int:
    """Return how often the scheduler has taken a processor from this process, all threads; 0 where nobody counts."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource else 0


def interleave(
    contenders: Sequence[Timed],
    *,
    seconds: float,
    min_rounds: int,
    max_rounds: int = 200,
    patience: float = math.inf,
    warmup: int = 1,
    inner: int = 1,
    before_round: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    count_preemptions: Callable[[], int] = preemptions,
) -> list[list[Sample]]:
    """Return the time of one call, per contender and round.

    A round calls every contender once. The order is ABC, BCA, CAB, ...: neighbours stay neighbours and nobody is
    always first after ``before_round``.

    Args:
        contenders: what to time.
        seconds: stop after the round that uses up this time, preparation included.
        min_rounds: but not before this many rounds.
        max_rounds: and never after more.
        patience: after this time three rounds are enough, in seconds.
        warmup: untimed rounds before.
        inner: calls between two looks at the clock, for calls too short for it.
        before_round: runs untimed before each round.
        clock: seconds, monotonic.
        count_preemptions: a counter that grows when the scheduler interrupts this process.
    """
    samples: list[list[Sample]] = [[] for _ in contenders]
    collecting = gc.isenabled()
    gc.disable()  # a collection inside one contender's call would be charged to it
    try:
        for i in range(warmup):
            for contender in contenders:
                contender.call(contender.prepare(i))
        begin, done = clock(), 0
        while _goes_on(clock() - begin, done, seconds, min_rounds, max_rounds, patience):
            before_round()
            for position in range(len(contenders)):
                j = (done + position) % len(contenders)
                argument = contenders[j].prepare(done)
                call = contenders[j].call
                before = count_preemptions()
                start = clock()
                for _ in range(inner):
                    call(argument)
                seconds_of_call = (clock() - start) / inner
                samples[j].append(Sample(seconds_of_call, count_preemptions() > before))
            done += 1
    finally:
        if collecting:
            gc.enable()
    return samples


def _goes_on(elapsed: float, done: int, seconds: float, min_rounds: int, max_rounds: int, patience: float) -> bool:
    needed = min_rounds if elapsed < patience else min(min_rounds, _FEWEST_ROUNDS)
    return done < needed or (done < max_rounds and elapsed < seconds)


def undisturbed(samples: Sequence[Sample]) -> list[float]:
    """Return the seconds of the calls that were not preempted, or of all calls if fewer than three were not.

    >>> undisturbed([Sample(1.0), Sample(9.0, preempted=True), Sample(1.1), Sample(0.9)])
    [1.0, 1.1, 0.9]
    """
    clean = [sample.seconds for sample in samples if not sample.preempted]
    return clean if len(clean) >= _FEWEST_ROUNDS else [sample.seconds for sample in samples]


def paired_ratio(baseline: Sequence[Sample], ours: Sequence[Sample]) -> Spread:
    """Return the spread of ``baseline / ours``, round by round: above 1, ours is faster.

    Rounds in which either call was preempted are left out, if three others remain.

    >>> paired_ratio([Sample(2.0), Sample(4.0), Sample(6.0)], [Sample(1.0), Sample(2.0), Sample(2.0)]).median
    2.0
    """
    pairs = zip(baseline, ours, strict=True)
    return Spread.of(undisturbed([Sample(b.seconds / o.seconds, b.preempted or o.preempted) for b, o in pairs]))


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean of positive numbers.

    >>> geometric_mean([1.0, 4.0])
    2.0

    Raises:
        MIDLError: no values, or one that is not positive.
    """
    values = list(values)
    if not values or min(values) <= 0:
        raise MIDLError(f"geometric_mean: values={values!r}, expected at least one, all above 0")
    return math.exp(math.fsum(map(math.log, values)) / len(values))
