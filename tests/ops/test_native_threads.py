"""Threads that work side by side on one call never touch what is another's: the same bits again and again.

Sizes at which a call is worth several threads, groups whose last vector reaches beyond them, and few rows, when threads
share most memory. A race shows in some calls only, so each is repeated.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import midl
from midl.ops.dispatch import unavailable_reason

if unavailable_reason("native"):
    pytest.skip(f"native kernels: {unavailable_reason('native')}", allow_module_level=True)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
GROUPS = [1, 2, 5, 6, 7, 8, 9, 10, 12, 16, 20, 24, 32, 40]
REPEATS = 20


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    with midl.kernels("native"):
        yield
    torch.set_num_threads(threads)


def check(call: Callable[[], tuple[Tensor, ...]], *, as_one_thread: bool = False) -> None:
    torch.set_num_threads(1)
    call()  # from the second call on by panels that are kept
    one = call()
    for threads in (2, 3):
        torch.set_num_threads(threads)
        expected = one if as_one_thread else call()
        for _ in range(REPEATS):
            for found, wanted in zip(call(), expected, strict=True):
                assert torch.equal(found, wanted), threads


@DTYPES
@pytest.mark.parametrize("group_size", GROUPS)
def test_linear_layers(dtype, group_size):
    layer = midl.MIDLinear(200, 1500 // group_size * group_size, group_size=group_size, dtype=dtype).eval()
    for rows in (1, 3, 10, 33, 150):  # from 128 on, two threads take rows rather than neurons
        x = torch.randn(rows, 200, dtype=dtype)
        with torch.inference_mode():
            check(lambda x=x: (layer(x),), as_one_thread=True)


@DTYPES
@pytest.mark.parametrize("group_size", GROUPS)
def test_convolutions(dtype, group_size):
    layer = midl.MIDConv2d(64, 480 // group_size * group_size, 3, padding=1, group_size=group_size, dtype=dtype).eval()
    for size in (2, 3, 7):
        x = torch.randn(1, 64, size, size, dtype=dtype)
        with torch.inference_mode():
            check(lambda x=x: (layer(x),), as_one_thread=True)


@DTYPES
@pytest.mark.parametrize("group_size", GROUPS)
def test_ffns(dtype, group_size):
    layer = midl.MIDFFN(120, 1000 // group_size * group_size, group_size=group_size, dtype=dtype).eval()
    for rows in (1, 3, 13, 40, 150):
        x = torch.randn(rows, 120, dtype=dtype)
        with torch.inference_mode():
            check(lambda x=x: (layer(x),))


@DTYPES
@pytest.mark.parametrize("group_size", GROUPS)
def test_gradients(dtype, group_size):
    layer = midl.MIDLinear(200, 1000 // group_size * group_size, group_size=group_size, dtype=dtype)
    for rows in (3, 40, 150):
        x = torch.randn(rows, 200, dtype=dtype, requires_grad=True)
        grad_y = torch.randn(rows, layer.out_features, dtype=dtype)
        check(lambda x=x, grad_y=grad_y: torch.autograd.grad(layer(x), [x, *layer.parameters()], grad_y))
