"""Fixtures of the native kernels' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import instruction_sets_to_test

import midl
from midl.ops import native, native_packing

_SETS = instruction_sets_to_test()


@pytest.fixture
def native_kernels(poisoned_memory: None) -> Iterator[None]:
    """Use the native kernels; instruction set and threads are restored, panels forgotten."""
    before, threads = native.instruction_set(), torch.get_num_threads()
    native_packing.clear_packed()
    midl.kernels("native")
    yield
    native.use_instruction_set(before)
    torch.set_num_threads(threads)


@pytest.fixture(params=_SETS)
def instruction_set(native_kernels: None, request: pytest.FixtureRequest) -> str:
    """Every instruction set that this CPU runs, in use."""
    native.use_instruction_set(request.param)
    return request.param
