"""Fixtures for all tests: fixed seeds, the kernel choice restored, a clock, and memory that nobody wrote to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import instruction_sets_to_test
from hypothesis import settings
from layer_clock import LayerClock
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle

import midl
from midl.adaptation import latency
from midl.ops import huge_pages

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


@pytest.fixture(params=instruction_sets_to_test())
def each_instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run the test by the native kernels of every instruction set, one after the other."""
    from midl.ops import native

    before = native.instruction_set()
    native.use_instruction_set(request.param)
    yield
    native.use_instruction_set(before)


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LayerClock]]:
    """Have ``midl.adapt`` time with a :class:`LayerClock`, made of the arguments."""
    handles: list[RemovableHandle] = []
    for limit in ("_MOST_TURNS", "_WHOLE_MOST_TURNS"):  # no two calls differ
        monkeypatch.setattr(latency, limit, 1)

    def set_clock(**costs: Any) -> LayerClock:
        clock = LayerClock(**costs)
        monkeypatch.setattr(latency, "clock", clock)
        handles.append(register_module_forward_hook(clock.see))
        return clock

    yield set_clock
    for handle in handles:
        handle.remove()


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
        (huge_pages, "empty"),
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
