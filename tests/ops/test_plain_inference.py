"""In plain inference the ops go past torch's dispatcher, and only where nobody would notice."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import midl
from midl.ops import dispatch
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


def test_only_without_autograd_modes_transforms_profiler_and_subclasses():
    assert not is_plain_inference(X, W)
    with torch.no_grad():
        assert is_plain_inference(X, W)
        with Seen():
            assert not is_plain_inference(X, W)
        with torch.profiler.profile():
            assert not is_plain_inference(X, W)
        torch.func.vmap(lambda x: x + (0 if not is_plain_inference(x, W) else pytest.fail("seen through")))(X)
        assert not is_plain_inference(X.as_subclass(type("Sub", (torch.Tensor,), {})), W)
    with torch.inference_mode():
        assert is_plain_inference(X, W)


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
