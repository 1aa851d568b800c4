"""Selection: exactly k groups of each row, the largest, ties to the lowest index, whatever the scores."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from midl.selection import selection_mask, topk_groups

NAN, INF = math.nan, math.inf
# Few values, so that ties are the rule; and the extremes.
score = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, 3e38, -3e38, INF, -INF, NAN]) | st.floats(width=32)
rows = st.lists(score, min_size=1, max_size=40)


def expected_selection(row: list[float], k: int) -> list[int]:
    """Sort by score, then by index; NaN as low as -inf."""
    rank = [-INF if math.isnan(v) else v for v in row]
    return sorted(sorted(range(len(row)), key=lambda i: (-rank[i], i))[:k])


@settings(max_examples=200)
@given(row=rows, data=st.data())
def test_topk_is_the_sorted_choice_of_any_row(row, data):
    k = data.draw(st.integers(1, len(row)))
    selected = topk_groups(torch.tensor([row], dtype=torch.float32), k)
    assert selected.dtype == torch.int32
    assert selected[0].tolist() == expected_selection(torch.tensor(row, dtype=torch.float32).tolist(), k)


@settings(max_examples=200)
@given(row=rows, threshold=score.filter(lambda v: not math.isnan(v)), data=st.data())
def test_a_threshold_leaves_those_of_the_k_that_reach_it_and_always_the_first(row, threshold, data):
    k = data.draw(st.integers(1, len(row)))
    rank = [-INF if math.isnan(v) else v for v in row]
    best = max(range(len(row)), key=lambda i: (rank[i], -i))
    chosen = [i for i in expected_selection(row, k) if i == best or rank[i] >= threshold]
    selected = topk_groups(torch.tensor([row], dtype=torch.float32), k, threshold)
    assert selected.dtype == torch.int32
    assert selected[0].tolist() == chosen + [-1] * (k - len(chosen))
    assert selection_mask(selected, len(row))[0].nonzero().flatten().tolist() == chosen


def test_every_score_reaches_minus_infinity():
    scores = torch.tensor([[NAN, -INF, 1.0, NAN], [NAN] * 4])
    assert torch.equal(topk_groups(scores, 3, -INF), topk_groups(scores, 3))


@settings(max_examples=50)
@given(row=rows, shift=st.integers(-20, 20), data=st.data())
def test_topk_of_a_row_does_not_depend_on_other_rows(row, shift, data):
    k = data.draw(st.integers(1, len(row)))
    other = [v + shift for v in row[::-1]]
    scores = torch.tensor([other, row, other])
    assert topk_groups(scores, k)[1].tolist() == topk_groups(scores[1:2], k)[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "row",
    [[0.0] * 8, [INF] * 8, [-INF] * 8, [NAN] * 8, [3e4] * 8, [NAN, 1, -INF, 2, NAN, 0, INF, -1]],
    ids=["equal", "inf", "-inf", "nan", "huge", "mixed"],
)
@pytest.mark.parametrize("k", [1, 3, 8])
def test_exactly_k_distinct_groups_whatever_the_scores(dtype, row, k):
    selected = topk_groups(torch.tensor([row, [0.5] * 8], dtype=dtype), k)
    assert selected.shape == (2, k)
    assert selected[0].tolist() == expected_selection(row, k)
    assert selected[1].tolist() == list(range(k))


def test_nan_is_chosen_only_when_nothing_else_is_left():
    assert topk_groups(torch.tensor([[NAN, -1e30, NAN, 0.0]]), 2).tolist() == [[1, 3]]
    assert topk_groups(torch.tensor([[NAN, -1e30, NAN, 0.0]]), 3).tolist() == [[0, 1, 3]]


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4), (2, 3, 4), (4,)])
def test_any_leading_shape(shape):
    selected = topk_groups(torch.randn(shape), 2)
    assert selected.shape == (*shape[:-1], 2)
    mask = selection_mask(selected, 4)
    assert mask.shape == shape
    assert bool((mask.sum(-1) == 2).all())


def test_the_mask_is_true_exactly_at_the_selected_groups():
    mask = selection_mask(torch.tensor([[0, 3], [1, 2]], dtype=torch.int32), 5)
    assert mask.tolist() == [[True, False, False, True, False], [False, True, True, False, False]]
