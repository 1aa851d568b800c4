"""Rows of tiny mirrors, with the columns of the real ones."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

Rows = dict[str, dict[str, list[Any]]]
"""Split to column to values."""


def png(seed: int, size: tuple[int, ...] = (28, 28)) -> dict[str, Any]:
    """Return a random image as the hub's Image feature stores it: in colour if ``size`` ends with 3."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def mnist_rows() -> Rows:
    return {
        "train": {"image": [png(i) for i in range(6)], "label": [0, 1, 2, 3, 4, 9]},
        "test": {"image": [png(i) for i in range(10, 13)], "label": [5, 6, 7]},
    }


def photograph_rows(image: str, *labels: str) -> Rows:
    """Return 32 x 32 images in colour: 6 and 3 rows, whose labels count up in every label column."""

    def rows(start: int, count: int) -> dict[str, list[Any]]:
        return {
            image: [png(start + i, (32, 32, 3)) for i in range(count)],
            **{label: list(range(count)) for label in labels},
        }

    return {"train": rows(0, 6), "test": rows(10, 3)}


def imdb_rows() -> Rows:
    return {
        "train": {
            "text": ["A good film.<br /><br />Good!", "A bad film", "good good " * 200, "Café, bad"],
            "label": [1, 0, 1, 0],
        },
        "test": {"text": ["A GOOD surprise", ""], "label": [1, 0]},
    }


def adult_rows() -> Rows:
    def person(age: int, workclass: str, income: str) -> dict[str, Any]:
        return {
            "age": age, "workclass": workclass, "fnlwgt": 100, "education": "HS-grad", "education-num": 9,
            "marital-status": "Divorced", "occupation": "?", "relationship": "Husband", "race": "White", "sex": "Male",
            "capital-gain": 0, "capital-loss": 0, "hours-per-week": 40, "native-country": "Cuba", "income": income,
        }  # fmt: skip

    train = [person(20, "Private", "<=50K"), person(40, "?", ">50K"), person(60, "Private", "<=50K")]
    test = [person(80, "Never-seen", ">50K"), person(40, "?", "<=50K")]
    return {
        split: {name: [row[name] for row in rows] for name in rows[0]}
        for split, rows in (("train", train), ("test", test))
    }
