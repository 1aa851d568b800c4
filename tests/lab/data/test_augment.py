"""Augmentation: what may change, what may not, and that a seed decides it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lab_rows import imdb_rows, photograph_rows

from midl.lab import data
from midl.lab.data.augment import crop, crop_and_flip, drop_tokens
from midl.lab.data.sets import imdb

Make = Callable[[str, Any], Path]


def shifted(image: np.ndarray, y: int, x: int) -> np.ndarray:
    """Return the crop at (y, x) of the image with mirrored borders of 4."""
    padded = np.pad(image, ((0, 0), (4, 4), (4, 4)), mode="reflect")
    return padded[:, y : y + image.shape[1], x : x + image.shape[2]]


@pytest.mark.parametrize(("augment", "views"), [(crop, 81), (crop_and_flip, 162)])
def test_every_shift_and_flip_comes_up_and_nothing_else(augment: Any, views: int) -> None:
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, 12, 11), dtype=torch.uint8)
    expected = {
        np.ascontiguousarray(view).tobytes()
        for y in range(9)
        for x in range(9)
        for view in (shifted(image.numpy(), y, x), shifted(image.numpy(), y, x)[:, :, ::-1])[: views // 81]
    }
    assert len(expected) == views
    images = augment(image.expand(5000, -1, -1, -1))
    assert (images.dtype, images.shape) == (torch.uint8, (5000, 3, 12, 11))
    assert {one.numpy().tobytes() for one in images} == expected


def test_rows_are_augmented_independently_and_stay_themselves() -> None:
    images = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 2, 8, 8)
    assert torch.equal(crop_and_flip(images), images)


def test_tokens_are_dropped_at_the_rate_and_padding_never() -> None:
    torch.manual_seed(0)
    ids = torch.full((200, 50), 7, dtype=torch.int16)
    ids[:, 40:] = 0
    dropped = drop_tokens(ids, rate=0.2, replacement=1, keep=0)
    assert dropped.dtype == torch.int16
    assert (dropped[:, 40:] == 0).all()
    assert (dropped[:, :40] == 1).float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert ((dropped == 1) | (dropped == ids)).all()


@pytest.mark.parametrize(("name", "column"), [("cifar10", "img"), ("svhn", "image")])
def test_training_batches_follow_from_the_seed_and_batches_are_as_stored(
    name: str, column: str, make_mirror: Make
) -> None:
    make_mirror(name, photograph_rows(column, "label"))
    dataset = data.load(name)
    rows = torch.tensor([3, 1])
    torch.manual_seed(5)
    x, y = dataset.training_batch(rows)
    again, _ = dataset.training_batch(rows)
    torch.manual_seed(5)
    assert torch.equal(dataset.training_batch(rows)[0], x)
    assert not torch.equal(again, x)
    assert y.tolist() == [3, 1]
    plain, _ = dataset.batch(dataset.train, rows)
    assert not torch.equal(x, plain)
    assert torch.equal(dataclasses.replace(dataset, augment=None).training_batch(rows)[0], plain)


def test_variants_of_a_data_set_augment_as_it_does(make_mirror: Make) -> None:
    make_mirror("imdb", imdb_rows())
    dataset = data.load("imdb")
    for variant in (dataset.hold_out(0.25), dataset.subset(0.5), dataset.corrupt_labels(0.5)):
        torch.manual_seed(0)
        x, _ = variant.training_batch(torch.arange(len(variant.train)).repeat(20))
        stored, _ = variant.batch(variant.train, torch.arange(len(variant.train)).repeat(20))
        assert 0 < ((x == imdb.UNKNOWN) & (stored != imdb.UNKNOWN)).sum() < stored.numel()


def test_digits_and_tables_are_not_augmented() -> None:
    digits = data.load("digits")
    rows = torch.arange(10)
    assert torch.equal(digits.training_batch(rows)[0], digits.batch(digits.train, rows)[0])
