"""Fixtures for all tests: fixed seeds, the kernel choice restored, and memory that shows when nobody wrote it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

import midl

# The same examples on every run, and no time limit for one of them on a busy machine.
settings.register_profile("midl", derandomize=True, database=None, deadline=None)
settings.load_profile("midl")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _restore_kernels() -> Iterator[None]:
    from midl.ops.dispatch import selected_kernels

    before = selected_kernels()
    yield
    midl.kernels(before)


def _called_from_midl() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith("midl.")


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what ``midl`` allocates uninitialised with NaN (integers: an index out of range): unwritten output shows."""

    def poison(allocate: Any) -> Any:
        def allocate_and_fill(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = allocate(*args, **kwargs)
            if not _called_from_midl() or out.is_meta:
                return out
            return out.fill_(float("nan") if out.is_floating_point() else -(2**31 - 1))

        return allocate_and_fill

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
