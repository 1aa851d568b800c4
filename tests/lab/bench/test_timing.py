import pytest

from midl.errors import MIDLError
from midl.lab.bench.timing import Sample, Spread, Timed, geometric_mean, interleave, paired_ratio, undisturbed


def never() -> int:
    return 0


class Clock:
    """A clock that only the contenders move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def contender(clock: Clock, name: str, seconds: float, log: list[str], preparation: float = 0.0) -> Timed:
    def prepare(i: int) -> int:
        clock.now += preparation
        return i

    def call(i: int) -> None:
        log.append(f"{name}{i}")
        clock.now += seconds

    return Timed(prepare, call)


def test_a_round_calls_everyone_once_and_the_first_place_rotates() -> None:
    clock, log = Clock(), []
    times = interleave(
        [contender(clock, name, 1.0, log) for name in "abc"],
        seconds=0,
        min_rounds=4,
        warmup=0,
        clock=clock,
        count_preemptions=never,
    )
    assert log == ["a0", "b0", "c0", "b1", "c1", "a1", "c2", "a2", "b2", "a3", "b3", "c3"]
    assert times == [[(1.0, False)] * 4] * 3


def test_preparation_and_warm_up_are_not_timed() -> None:
    clock, log = Clock(), []
    times = interleave(
        [contender(clock, "a", 2.0, log, preparation=5.0)],
        seconds=0,
        min_rounds=2,
        warmup=3,
        clock=clock,
        count_preemptions=never,
    )
    assert times == [[(2.0, False)] * 2]
    assert log == ["a0", "a1", "a2", "a0", "a1"]


def test_rounds_stop_at_the_time_budget_and_at_the_maximum() -> None:
    clock = Clock()
    assert (
        len(
            interleave([contender(clock, "a", 1.0, [])], seconds=5, min_rounds=1, clock=clock, count_preemptions=never)[
                0
            ]
        )
        == 5
    )
    limited = interleave(
        [contender(clock, "a", 1.0, [])], seconds=50, min_rounds=1, max_rounds=7, clock=clock, count_preemptions=never
    )
    assert len(limited[0]) == 7


def test_a_slow_case_is_content_with_three_rounds_when_patience_ends() -> None:
    clock = Clock()
    slow = contender(clock, "a", 10.0, [])
    assert len(interleave([slow], seconds=1, min_rounds=7, patience=5, clock=clock, count_preemptions=never)[0]) == 3
    assert len(interleave([slow], seconds=1, min_rounds=7, patience=45, clock=clock, count_preemptions=never)[0]) == 5
    assert len(interleave([slow], seconds=1, min_rounds=2, patience=5, clock=clock, count_preemptions=never)[0]) == 2


def test_inner_calls_share_one_look_at_the_clock() -> None:
    clock, log = Clock(), []
    times = interleave(
        [contender(clock, "a", 0.5, log)],
        seconds=0,
        min_rounds=1,
        warmup=0,
        inner=10,
        clock=clock,
        count_preemptions=never,
    )
    assert times == [[(0.5, False)]]
    assert len(log) == 10


def test_before_round_is_not_charged_to_the_first_contender() -> None:
    clock = Clock()

    def sweep() -> None:
        clock.now += 100.0

    times = interleave(
        [contender(clock, "a", 1.0, [])],
        seconds=0,
        min_rounds=3,
        before_round=sweep,
        clock=clock,
        count_preemptions=never,
    )
    assert times == [[(1.0, False)] * 3]


def test_calls_that_the_scheduler_interrupts_are_marked() -> None:
    clock, count = Clock(), iter([0, 0, 3, 4, 4, 4])
    (samples,) = interleave(
        [contender(clock, "a", 1.0, [])],
        seconds=0,
        min_rounds=3,
        warmup=0,
        clock=clock,
        count_preemptions=lambda: next(count),
    )
    assert [sample.preempted for sample in samples] == [False, True, False]


def test_ratios_are_taken_round_by_round() -> None:
    # A slow-down of the machine that hits both of a pair leaves the ratio alone.
    baseline, ours = ([Sample(s) for s in seconds] for seconds in ((2.0, 20.0, 2.0), (1.0, 10.0, 1.0)))
    assert paired_ratio(baseline, ours) == Spread(2.0, 2.0, 2.0)


def test_interrupted_calls_count_only_where_too_few_others_remain() -> None:
    clean, interrupted = Sample(1.0), Sample(9.0, preempted=True)
    assert undisturbed([clean, interrupted, clean, clean]) == [1.0, 1.0, 1.0]
    assert undisturbed([clean, interrupted, clean]) == [1.0, 9.0, 1.0]
    baseline = [clean, interrupted, clean, clean, clean]
    ours = [clean, clean, clean, interrupted, clean]
    assert paired_ratio(baseline, ours) == Spread(1.0, 1.0, 1.0)


def test_geometric_mean() -> None:
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert geometric_mean([1.0, 10.0, 100.0]) == pytest.approx(10.0)


@pytest.mark.parametrize("values", [[], [1.0, 0.0], [-1.0]])
def test_geometric_mean_of_nothing_or_of_non_positive_numbers_is_an_error(values: list[float]) -> None:
    with pytest.raises(MIDLError, match="above 0"):
        geometric_mean(values)


def test_the_spread_of_one_value_is_that_value() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
