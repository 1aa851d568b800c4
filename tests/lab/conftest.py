"""Fixtures of the lab's tests: a cache of their own, no mirror, tiny mirrors made on the spot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from lab_rows import Rows


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIDL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MIDL_DATA", raising=False)


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Rows], Path]:
    """Return a function that writes a mirror with one data set, points MIDL_DATA to it and returns its folder."""
    datasets = pytest.importorskip("datasets")

    def make(name: str, rows: Rows) -> Path:
        folder = tmp_path / "mirror"
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split, columns in rows.items():
            table = datasets.Dataset.from_dict(columns)
            table.to_parquet(folder / name / f"{split}.parquet")
        monkeypatch.setenv("MIDL_DATA", str(folder))
        return folder

    return make
