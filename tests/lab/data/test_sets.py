"""The data sets themselves: splits, encodings, and no statistic that has seen a test row."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lab_rows import adult_rows, imdb_rows, mnist_rows, photograph_rows, png
from PIL import Image

from midl.errors import DataError
from midl.lab import data
from midl.lab.data.sets import adult as adult_module
from midl.lab.data.sets import imdb

Make = Callable[[str, Any], Path]

UCI_TEXT = """|1x3 Cross validator
25, Private, 226802, 11th, 7, Never-married, Machine-op-inspct, Own-child, Black, Male, 0, 0, 40, United-States, <=50K.
44, ?, 160323, Some-college, 10, Divorced, ?, Husband, Black, Male, 7688, 0, 40, United-States, >50K.

"""


def test_digits_split_is_stratified_disjoint_and_always_the_same() -> None:
    digits, again = data.load("digits"), data.load("digits")
    assert len(digits.train) + len(digits.test) == 1797
    assert torch.equal(digits.train.x, again.train.x)
    for label in range(10):
        in_test, in_train = int((digits.test.y == label).sum()), int((digits.train.y == label).sum())
        assert in_test == round((in_test + in_train) * 0.2)


def test_digits_are_standardised_by_training_rows() -> None:
    digits = data.load("digits")
    x, _ = digits.batch(digits.train, slice(None))
    assert torch.isfinite(x).all()
    varying = digits.train.x.std(0) > 0
    assert x.mean(0).abs().max() < 1e-5
    assert (x.std(0, correction=0)[varying] - 1).abs().max() < 1e-4


def test_hold_out_takes_training_rows_only_and_keeps_all_of_them() -> None:
    digits = data.load("digits")
    held = digits.hold_out(0.25)
    assert len(held.train) + len(held.test) == len(digits.train)
    assert torch.equal(held.test.x, digits.hold_out(0.25).test.x)
    rows = torch.cat([held.train.x, held.test.x]).sum(1).sort().values
    assert torch.equal(rows, digits.train.x.sum(1).sort().values)
    assert held.fingerprint != digits.fingerprint


@pytest.mark.parametrize("fraction", [0.0, 1.0, 1e-9])
def test_hold_out_refuses_an_empty_side(fraction: float) -> None:
    with pytest.raises(DataError, match=rf"hold_out fraction={fraction}.*expected rows on both sides"):
        data.load("digits").hold_out(fraction)


def test_image_statistics_do_not_see_test_rows(make_mirror: Make) -> None:
    rows = mnist_rows()
    make_mirror("mnist", rows)
    before = data.load("mnist")
    rows["test"]["image"] = [png(i) for i in range(50, 53)]
    make_mirror("mnist", rows)
    after = data.load("mnist")
    assert not torch.equal(before.test.x, after.test.x)
    assert torch.equal(before.mean, after.mean)
    assert torch.equal(before.std, after.std)


def test_adult_encodes_with_what_the_training_rows_taught(make_mirror: Make) -> None:
    make_mirror("adult", adult_rows())
    adult = data.load("adult")
    # Six numbers, workclass (?, Private), and seven other categories with one value each.
    assert adult.input_shape == (6 + 2 + 7,)
    assert adult.train.y.tolist() == [0, 1, 0]
    assert adult.test.y.tolist() == [1, 0]
    x, _ = adult.batch(adult.train, slice(None))
    assert x[:, 6:8].tolist() == [[0, 1], [1, 0], [0, 1]]
    assert adult.mean[0] == 40
    unseen, _ = adult.batch(adult.test, slice(0, 1))
    assert unseen[0, 6:8].tolist() == [0, 0]
    assert unseen[0, 0] == pytest.approx((80 - 40) / (800 / 3) ** 0.5)


def test_adult_statistics_do_not_see_test_rows(make_mirror: Make) -> None:
    rows = adult_rows()
    make_mirror("adult", rows)
    before = data.load("adult")
    rows["test"]["age"] = [17, 90]
    rows["test"]["workclass"] = ["State-gov", "Private"]
    make_mirror("adult", rows)
    after = data.load("adult")
    assert not torch.equal(before.test.x, after.test.x)
    assert torch.equal(before.mean, after.mean)
    assert torch.equal(before.std, after.std)
    assert torch.equal(before.train.x, after.train.x)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("income", ">50K.", r"row 1 has income='>50K\.', expected one of \['<=50K', '>50K'\]"),
        ("workclass", None, r"row 1 has workclass=None, expected a string"),
    ],
)
def test_adult_refuses_wrong_rows(make_mirror: Make, column: str, value: object, message: str) -> None:
    rows = adult_rows()
    rows["train"][column][1] = value
    make_mirror("adult", rows)
    with pytest.raises(DataError, match=rf"train\.parquet: {message}"):
        data.load("adult")


def test_adult_reads_ucis_own_text() -> None:
    table = adult_module.parse_uci(UCI_TEXT, "UCI")
    table.check_columns(adult_module.SPEC.columns)
    assert table.integers("capital-gain").tolist() == [0, 7688]
    assert table.strings("workclass") == ["Private", "?"]
    assert table.strings("income") == ["<=50K", ">50K"]


def test_adult_download_is_checked_against_the_known_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.urlopen", lambda address, timeout: io.BytesIO(UCI_TEXT.encode()))
    digest = hashlib.sha256(UCI_TEXT.encode()).hexdigest()
    with pytest.raises(DataError, match=rf"adult\.data has SHA-256 {digest}, expected 5b00264"):
        data.load("adult")


@pytest.mark.parametrize(
    ("name", "rows", "classes"),
    [
        ("cifar10", photograph_rows("img", "label"), 10),
        ("cifar100", photograph_rows("img", "fine_label", "coarse_label"), 100),
        ("svhn", photograph_rows("image", "label"), 10),
    ],
)
def test_photographs_arrive_exactly(name: str, rows: Any, classes: int, make_mirror: Make) -> None:
    make_mirror(name, rows)
    dataset = data.load(name)
    assert (dataset.input_shape, dataset.num_classes) == ((3, 32, 32), classes)
    assert dataset.train.y.tolist() == list(range(6))
    pixels = np.asarray(Image.open(io.BytesIO(next(iter(rows["test"].values()))[2]["bytes"])))
    assert np.array_equal(dataset.test.x[2].numpy().transpose(1, 2, 0), pixels)
    x, _ = dataset.batch(dataset.train, slice(None))
    assert x.mean((0, 2, 3)).abs().max() < 1e-5
    assert (x.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5


def test_cifar100_learns_the_fine_labels(make_mirror: Make) -> None:
    rows = photograph_rows("img", "fine_label", "coarse_label")
    rows["train"]["fine_label"] = [99, 98, 97, 96, 95, 94]
    make_mirror("cifar100", rows)
    assert data.load("cifar100").train.y.tolist() == [99, 98, 97, 96, 95, 94]


def test_reviews_become_ids_of_a_vocabulary_learnt_on_training_rows(make_mirror: Make) -> None:
    make_mirror("imdb", imdb_rows())
    dataset = data.load("imdb")
    assert dataset.input_shape == (imdb.TOKENS,)
    x, y = dataset.batch(dataset.train, slice(None))
    assert (x.dtype, y.tolist()) == (torch.int64, [1, 0, 1, 0])
    lengths = (x != imdb.PADDING).sum(1).tolist()
    # "a good film . good !" without the line breaks; 400 words cut to what fits; "café , bad".
    assert lengths == [6, 3, imdb.TOKENS, 3]
    good = x[2, 0]
    assert torch.equal((x[0] == good).nonzero().flatten(), torch.tensor([1, 4]))
    assert (x[2] == good).all()
    unseen, _ = dataset.batch(dataset.test, slice(None))
    assert unseen[0, :4].tolist() == [x[1, 0], good, imdb.UNKNOWN, imdb.PADDING]
    assert (unseen[1] == imdb.PADDING).all()
    assert int(x.max()) < imdb.VOCABULARY


def test_the_vocabulary_does_not_see_test_rows(make_mirror: Make) -> None:
    rows = imdb_rows()
    make_mirror("imdb", rows)
    before = data.load("imdb")
    rows["test"]["text"] = ["surprise " * 300, "surprise"]
    make_mirror("imdb", rows)
    after = data.load("imdb")
    assert torch.equal(before.train.x, after.train.x)
    assert set(after.test.x.unique().tolist()) == {imdb.PADDING, imdb.UNKNOWN}


def test_subset_is_stratified_reproducible_and_leaves_the_rest_alone() -> None:
    digits = data.load("digits")
    tenth = digits.subset(0.1, seed=1)
    for label in range(10):
        assert int((tenth.train.y == label).sum()) == round(int((digits.train.y == label).sum()) * 0.1)
    assert torch.equal(tenth.train.x, digits.subset(0.1, seed=1).train.x)
    assert not torch.equal(tenth.train.x, digits.subset(0.1, seed=2).train.x)
    assert tenth.test is digits.test
    assert tenth.mean is digits.mean
    assert len({d.fingerprint for d in (digits, tenth, digits.subset(0.1, seed=2), digits.subset(0.2, seed=1))}) == 4
    assert len(digits.subset(1.0).train) == len(digits.train)
    assert torch.equal(digits.subset(1e-9).train.y.sort().values, torch.arange(10))


def test_corrupted_labels_are_uniform_over_the_chosen_rows() -> None:
    digits = data.load("digits")
    noisy = digits.corrupt_labels(0.4, seed=1)
    assert torch.equal(noisy.train.x, digits.train.x)
    changed = (noisy.train.y != digits.train.y).float().mean().item()
    assert changed == pytest.approx(0.4 * 0.9, abs=0.03)  # a tenth of the random labels is right by chance
    assert set(noisy.train.y.tolist()) == set(range(10))
    assert torch.equal(noisy.train.y, digits.corrupt_labels(0.4, seed=1).train.y)
    assert noisy.test is digits.test
    assert len({d.fingerprint for d in (digits, noisy, digits.corrupt_labels(0.4, seed=2))}) == 3
    assert torch.equal(digits.corrupt_labels(0.0).train.y, digits.train.y)


@pytest.mark.parametrize(
    ("method", "fraction", "expected"),
    [("subset", 0.0, r"\(0, 1\]"), ("subset", 1.5, r"\(0, 1\]"), ("corrupt_labels", -0.1, r"\[0, 1\]")],
)
def test_fractions_outside_their_range_are_refused(method: str, fraction: float, expected: str) -> None:
    with pytest.raises(DataError, match=rf"digits: {method} fraction={fraction}, expected a number in {expected}"):
        getattr(data.load("digits"), method)(fraction)
