"""Which rows stand for all: the first ones, unless the source sorted them."""

from __future__ import annotations

import pytest
import torch

from midl.lab import data

SHUFFLED = torch.randint(4, (3000,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rows", [1, 100, 3000, 5000])
def test_of_rows_in_random_order_the_first_ones(rows: int) -> None:
    assert torch.equal(data.rows_for_all(SHUFFLED, rows), torch.arange(min(rows, 3000)))


def test_of_sorted_rows_some_of_every_class_the_same_ones_each_time() -> None:
    labels = SHUFFLED.sort().values
    rows = data.rows_for_all(labels, 400)
    assert torch.equal(rows, data.rows_for_all(labels, 400))
    assert len(rows.unique()) == 400
    assert bool((torch.bincount(labels[rows]) > 70).all())
    assert len(data.rows_for_all(labels, 5000)) == 3000


@pytest.mark.parametrize(
    ("labels", "random"),
    [
        (SHUFFLED, True),
        (SHUFFLED.sort().values, False),
        (torch.arange(1000) // 10 % 2, False),  # in blocks
        (torch.arange(1000) % 10, True),  # in turn
        (torch.zeros(1000, dtype=torch.long), True),  # there is one class only
        (torch.tensor([1]), True),
        (torch.tensor([0, 0, 1]), True),  # too few to tell
    ],
)
def test_order_is_told_from_the_labels(labels: torch.Tensor, random: bool) -> None:
    assert data.in_random_order(labels) is random
