"""adult: does a person of the 1994 US census earn more than 50,000 dollars? The official split, 32,561 / 16,281 rows.

Numbers are standardised, categories one-hot; both learnt from the training rows. ``?`` (missing) is a category of its
own; a category that only the test rows have is all zeros.

Source: B. Becker, R. Kohavi, "Adult", UCI Machine Learning Repository, 1996. Licence CC BY 4.0.
"""

from __future__ import annotations

import hashlib
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from midl.errors import DataError
from midl.lab.data.dataset import Arrays
from midl.lab.data.registry import Spec
from midl.lab.data.statistics import column_statistics
from midl.lab.data.table import Table

__all__ = ["SPEC"]

_NUMBERS = ("age", "fnlwgt", "education-num", "capital-gain", "capital-loss", "hours-per-week")
_CATEGORIES = (
    "workclass", "education", "marital-status", "occupation", "relationship", "race", "sex", "native-country",
)  # fmt: skip
_INCOMES = ("<=50K", ">50K")
# In the order of UCI's files.
_COLUMNS = (
    "age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship", "race",
    "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "income",
)  # fmt: skip

_UCI = "https://archive.ics.uci.edu/ml/machine-learning-databases/adult"
_UCI_FILES = {
    "train": ("adult.data", "5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d"),
    "test": ("adult.test", "a2a9044bc167a35b2361efbabec64e89d69ce82d9790d2980119aac5fd7e9c05"),
}


def _download(scratch: Path) -> Mapping[str, Table]:
    tables = {}
    for split, (file, expected) in _UCI_FILES.items():
        address = f"{_UCI}/{file}"
        with urllib.request.urlopen(address, timeout=60) as response:
            content = response.read()
        digest = hashlib.sha256(content).hexdigest()
        if digest != expected:
            raise DataError(f"{address} has SHA-256 {digest}, expected {expected}")
        tables[split] = parse_uci(content.decode(), address)
    return tables


def parse_uci(text: str, origin: str) -> Table:
    """Return the rows of UCI's comma-separated text: comment and blank lines skipped, test labels without their dot."""
    import datasets

    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("|")]
    cells = [[cell.strip() for cell in line.split(",")] for line in lines]
    columns: dict[str, list[str] | list[int]] = {}
    for name, values in zip(_COLUMNS, zip(*cells, strict=True), strict=True):
        columns[name] = [int(value) for value in values] if name in _NUMBERS else list(values)
    columns["income"] = [str(income).removesuffix(".") for income in columns["income"]]
    return Table(datasets.Dataset.from_dict(columns), origin)


def _decode(tables: Mapping[str, Table]) -> Arrays:
    train, test = tables["train"], tables["test"]
    train_numbers, test_numbers = (
        np.stack([table.integers(name) for name in _NUMBERS], axis=1).astype(np.float32) for table in (train, test)
    )
    train_parts, test_parts = [train_numbers], [test_numbers]
    for name in _CATEGORIES:
        train_values, test_values = train.strings(name), test.strings(name)
        known = sorted(set(train_values))
        train_parts.append(_one_hot(train_values, known))
        test_parts.append(_one_hot(test_values, known))
    train_x, test_x = np.concatenate(train_parts, axis=1), np.concatenate(test_parts, axis=1)
    mean, std = np.zeros(train_x.shape[1], np.float32), np.ones(train_x.shape[1], np.float32)
    mean[: len(_NUMBERS)], std[: len(_NUMBERS)] = column_statistics(train_numbers)
    return Arrays(train_x, _incomes(train), test_x, _incomes(test), mean, std)


def _one_hot(values: list[str], known: list[str]) -> np.ndarray:
    index = {value: i for i, value in enumerate(known)}
    out = np.zeros((len(values), len(known)), dtype=np.float32)
    for row, value in enumerate(values):
        if value in index:
            out[row, index[value]] = 1.0
    return out


def _incomes(table: Table) -> np.ndarray:
    values = table.strings("income")
    for row, value in enumerate(values):
        if value not in _INCOMES:
            raise DataError(f"{table.origin}: row {row} has income={value!r}, expected one of {list(_INCOMES)}")
    return np.array([_INCOMES.index(value) for value in values], dtype=np.int64)


SPEC = Spec(num_classes=2, decode=_decode, columns=_COLUMNS, download=_download, origin=f"UCI ({_UCI})")
