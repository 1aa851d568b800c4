"""Errors between measured ways: exact where the factor is smooth, everything measured where it cannot be known."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from midl.adaptation.between import fill_grid, fill_line

sizes = st.integers(1, 6)


@given(sizes, sizes, st.floats(0.1, 10), st.floats(-0.5, 0.5), st.floats(-0.5, 0.5))
def test_a_factor_that_grows_by_the_same_at_every_step_is_found_exactly(rows, columns, factor, down, across):
    left_out = [[math.exp(-i - 0.3 * j) for j in range(columns)] for i in range(rows)]
    measured = []

    def measure(i, j):
        measured.append((i, j))
        return factor * math.exp(down * i + across * j) * left_out[i][j]

    errors = fill_grid(left_out, measure)
    assert len(measured) == len(set(measured)) == min(rows, 3) * min(columns, 3)
    for i in range(rows):
        for j in range(columns):
            assert errors[i][j] == pytest.approx(factor * math.exp(down * i + across * j) * left_out[i][j])


def test_what_was_measured_is_kept_as_it_was():
    left_out = [[5.0, 4.0, 3.0, 2.0, 1.0]]
    found = [3.0, 7.0, 1.0, 9.0, 2.0]
    errors = fill_grid(left_out, lambda i, j: found[j])[0]
    assert [errors[j] for j in (0, 2, 4)] == [3.0, 1.0, 2.0]
    assert errors[1] == pytest.approx(4 * math.sqrt(3 / 5 * 1 / 3))


def test_nothing_left_out_is_no_error_and_teaches_nothing():
    errors = fill_grid([[2.0, 1.0, 0.5, 0.0, 0.0]], lambda i, j: [4.0, 0, 1.0, 0, 1e-20][j])[0]
    assert errors == [4.0, pytest.approx(2.0), 1.0, 0.0, 1e-20]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_where_one_cannot_be_computed_all_are_measured(bad):
    errors = fill_grid([[2.0, 1.0, 0.5, 0.2]] * 2, lambda i, j: bad if (i, j) == (1, 3) else 10.0 * i + j)
    assert errors[0] == [0, 1, 2, 3]
    assert errors[1][:3] == [10, 11, 12]
    assert not math.isfinite(errors[1][3])


def test_without_anything_left_out_where_it_was_measured_all_are_measured():
    assert fill_grid([[0.0, 1.0, 0.0, 2.0, 0.0]], lambda i, j: float(j)) == [[0, 1, 2, 3, 4]]


def test_empty_and_short_lines():
    assert fill_grid([], lambda i, j: 1.0) == []
    assert fill_grid([[], []], lambda i, j: 1.0) == [[], []]
    assert fill_line([], lambda i: 1.0) == []
    assert fill_line([3.0], lambda i: 0.25) == [0.25]
    assert fill_line([3.0, 2.0, 1.0], float) == [0, 1, 2]
