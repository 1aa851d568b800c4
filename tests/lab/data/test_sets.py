"""The data sets themselves: splits, encodings, and no statistic that has seen a test row."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_rows import adult_rows, mnist_rows, png

from midl.errors import DataError
from midl.lab import data
from midl.lab.data.sets import adult as adult_module

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
