"""The knapsack against every combination."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from midl.adaptation import Option, allocate
from midl.errors import MIDLError

option = st.builds(Option, st.integers(0, 60), st.floats(0, 1, width=32))


def best(options, budget):
    sums = [
        (sum(o.error for o in picked), sum(o.cost for o in picked)) for picked in itertools.product(*options)
    ]  # fmt: skip
    return min((error for error, cost in sums if cost <= budget), default=None)


@given(st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=4), st.integers(0, 200))
def test_equals_the_best_of_all_combinations(options, budget):
    expected = best(options, budget)
    if expected is None:
        with pytest.raises(MIDLError, match="expected at least"):
            allocate(options, budget)
        return
    chosen = [layer[i] for layer, i in zip(options, allocate(options, budget), strict=True)]
    assert sum(o.cost for o in chosen) <= budget
    assert sum(o.error for o in chosen) == pytest.approx(expected)


def test_large_costs_keep_the_budget_and_the_stated_bound():
    options = [
        [Option(int(c), float(e)) for c, e in zip(torch.randint(1, 10**9, (5,)), torch.rand(5), strict=True)]
        for _ in range(4)
    ]
    budget = sum(max(o.cost for o in layer) for layer in options) * 6 // 10
    chosen = [layer[i] for layer, i in zip(options, allocate(options, budget), strict=True)]
    assert sum(o.cost for o in chosen) <= budget
    error = sum(o.error for o in chosen)
    assert best(options, budget) - 1e-12 <= error <= best(options, budget - 4 * (budget // 10_000 + 1)) + 1e-12


def test_a_budget_that_only_the_cheapest_options_meet_is_met():
    options = [[Option(10**9 + 7, 0.5), Option(2 * 10**9, 0.1)]] * 3
    assert allocate(options, 3 * (10**9 + 7)) == [0, 0, 0]


def test_the_error_says_the_least_budget():
    with pytest.raises(MIDLError, match="budget=9, expected at least 10"):
        allocate([[Option(4, 0.0)], [Option(6, 0.0), Option(8, 0.0)]], 9)
