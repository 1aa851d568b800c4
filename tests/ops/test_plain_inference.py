"""In plain inference the ops go past torch's dispatcher, and only where nobody would notice."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import midl
from midl.ops import dispatch, native
from midl.ops import linear as linear_op
from midl.ops.dispatch import is_plain_inference

X, W = torch.randn(2, 8), torch.nn.Parameter(torch.randn(16, 8))


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def by_kernels(x, weight):
    return native.infers_plainly(x)


@pytest.mark.parametrize("is_plain", [is_plain_inference, by_kernels])
def test_only_without_autograd_modes_transforms_profiler_and_subclasses(is_plain):
    if is_plain is by_kernels and (reason := dispatch.unavailable_reason("native")):
        pytest.skip(f"native kernels: {reason}")
    assert not is_plain(X, W)
    with torch.no_grad():
        assert is_plain(X, W)
        with Seen():
            assert not is_plain(X, W)
        with torch.profiler.profile():
            assert not is_plain(X, W)
        torch.func.vmap(lambda x: x + (0 if not is_plain(x, W) else pytest.fail("seen through")))(X)
        for other in (
            X.as_subclass(type("Sub", (torch.Tensor,), {})), X.to("meta"), X.to_sparse(), W,
            torch.complex(X, X).conj().imag, torch._efficientzerotensor(3), torch.nested.nested_tensor([X]),
        ):  # fmt: skip
            assert not is_plain(other, W)
        assert is_plain(X, W)
    with torch.inference_mode():
        assert is_plain(X, W)
        assert is_plain(torch.ones(2), W)
    traced = []
    torch.jit.trace(lambda x: (traced.append(is_plain(x, W)), x + 1)[1], X)
    assert not traced[0]  # further calls check the trace


def test_the_kernels_leave_autocast_and_what_is_no_tensor_to_others():
    if reason := dispatch.unavailable_reason("native"):
        pytest.skip(f"native kernels: {reason}")
    with torch.no_grad(), torch.autocast("cpu"):
        assert not native.infers_plainly(X)
    with torch.no_grad():
        assert not native.infers_plainly(None)


def test_modes_and_the_profiler_see_the_op():
    layer = midl.MIDLinear(8, 16, rank=2)
    conv = midl.MIDConv2d(3, 16, 3, rank=2)
    with torch.no_grad():
        with Seen() as seen:
            layer(X)
            conv(torch.randn(1, 3, 4, 4))
        assert {"midl::linear", "midl::conv2d"} <= set(seen.names)
        with torch.profiler.profile() as profile:
            layer(X)
    assert "midl::linear" in {event.name for event in profile.events()}


def test_past_the_dispatcher_the_result_is_the_same(monkeypatch):
    layer = midl.MIDLinear(8, 16, rank=2)
    expected = layer(X)
    calls = []
    monkeypatch.setattr(linear_op, "resolve", lambda *args, **kw: calls.append(1) or dispatch.resolve(*args, **kw))
    with torch.no_grad():
        assert torch.equal(layer(X), expected)
    assert calls
