"""torch.compile(fullgraph=True): the eager result, and one recompilation at most when the batch size changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import midl
from midl import MIDConv2d, MIDLinear

CASES = {
    "linear": (lambda: MIDLinear(16, 32, rank=4, group_size=4), lambda b: (b, 16)),
    "linear with noise and span": (
        lambda: MIDLinear(16, 32, rank=4, span=2, noise=1.0, gate="light", ste="dense"),
        lambda b: (b, 5, 16),
    ),
    "conv2d": (lambda: MIDConv2d(4, 8, 3, padding=1, rank=4, group_size=2), lambda b: (b, 4, 6, 6)),
    "conv2d image": (
        lambda: MIDConv2d(4, 8, (2, 3), padding="same", rank=4, select="image"),
        lambda b: (b, 4, 6, 6),
    ),
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    midl.kernels("reference")
    yield
    torch._dynamo.reset()


def run(model, layer, x, seed):
    """Return output and gradients, the noise drawn from ``seed``."""
    torch.manual_seed(seed)
    x = x.detach().requires_grad_()
    y = model(x)
    return (y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))


@pytest.mark.parametrize("case", list(CASES))
def test_compiled_is_eager_and_a_second_change_of_batch_size_does_not_recompile(case):
    build, shape = CASES[case]
    layer = build()
    # The eager backend traces and guards like any other, in a fraction of the time; the next test generates code.
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for batch in (4, 7):
        x = torch.randn(shape(batch))
        for ours, theirs in zip(run(compiled, layer, x, 3), run(layer, layer, x, 3), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (9, 5):
            x = torch.randn(shape(batch))
            for ours, theirs in zip(run(compiled, layer, x, 3), run(layer, layer, x, 3), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_generated_code_gives_the_eager_result_forward_and_backward():
    model = nn.Sequential(
        MIDConv2d(3, 8, 3, padding=1, rank=4), nn.ReLU(), nn.Flatten(), MIDLinear(72, 16, rank=4, noise=0.1)
    ).eval()  # fmt: skip
    x = torch.randn(5, 3, 3, 3).to(memory_format=torch.channels_last)
    compiled = torch.compile(model, fullgraph=True)
    for ours, theirs in zip(run(compiled, model, x, 0), run(model, model, x, 0), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_choice_of_kernels_is_made_when_the_compiled_layer_runs():
    layer, x = MIDLinear(16, 32, rank=4), torch.randn(3, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True), midl.kernels("dense"):
        assert torch.equal(compiled(x), layer(x))


def test_a_changed_budget_takes_effect_in_compiled_code():
    layer, x = MIDLinear(16, 32, rank=4), torch.randn(3, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x)
    layer.active = 0.1
    torch.testing.assert_close(compiled(x), layer(x))
