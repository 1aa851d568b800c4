"""Plain training calls go past torch's dispatcher, with the results and gradients of the registered ops."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import midl
from midl.errors import KernelError

LAYERS = {
    "linear": lambda: (midl.MIDLinear(12, 32, rank=3, group_size=4, noise=0.0), torch.randn(5, 12)),
    "conv2d": lambda: (midl.MIDConv2d(3, 16, 3, rank=3, padding=1), torch.randn(2, 3, 5, 5)),
    "ffn": lambda: (midl.MIDFFN(12, 32, rank=3), torch.randn(5, 12)),
}


@pytest.fixture(params=LAYERS)
def layer_and_input(request):
    torch.manual_seed(0)
    layer, x = LAYERS[request.param]()
    return layer.eval(), x, request.param


def gradients(layer, x, run):
    x = x.clone().requires_grad_()
    y = run(layer, x)
    return y, *torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))


def test_output_and_gradients_are_those_of_the_registered_op(layer_and_input):
    layer, x, name = layer_and_input

    def through_the_dispatcher(layer, x):
        with torch.profiler.profile() as profile:
            y = layer(x)
        assert f"midl::{name}" in {event.name for event in profile.events()}
        return y

    def past_it(layer, x):
        y = layer(x)
        nodes = [y.grad_fn]
        names = []
        while nodes:  # the layer may reshape what the op returns
            node = nodes.pop()
            if node is not None:
                names.append(type(node).__name__)
                nodes += [next_node for next_node, _ in node.next_functions]
        assert f"Eager{name.capitalize()}Backward" in names
        return y

    expected = gradients(layer, x, through_the_dispatcher)
    for actual, wanted in zip(gradients(layer, x, past_it), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_checkpointing(layer_and_input):
    layer, x, _ = layer_and_input
    expected = gradients(layer, x, lambda layer, x: layer(x))
    actual = gradients(layer, x, lambda layer, x: checkpoint(layer, x, use_reentrant=False))
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    x = x.clone().requires_grad_()
    checkpoint(layer, x, use_reentrant=True).square().sum().backward()
    assert torch.equal(x.grad, expected[1])


def test_only_what_needs_a_gradient_gets_one(layer_and_input):
    layer, x, _ = layer_and_input
    layer.requires_grad_(False)
    assert layer(x).grad_fn is None
    layer.light_up.requires_grad_()
    layer(x).sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is not None] == ["light_up"]


def test_second_derivatives_are_refused(layer_and_input):
    layer, x, _ = layer_and_input
    x.requires_grad_()
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(KernelError, match="second derivatives"):
        first.sum().backward()


def test_weights_changed_between_forward_and_backward_are_noticed(layer_and_input):
    layer, x, _ = layer_and_input
    loss = layer(x).sum()
    with torch.no_grad():
        layer.weight.add_(1) if hasattr(layer, "weight") else next(layer.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_batched_gradients(layer_and_input):
    layer, x, _ = layer_and_input
    y = layer(x)
    grads = torch.randn(3, *y.shape)
    (actual,) = torch.autograd.grad(y, layer.light_up, grads, is_grads_batched=True, retain_graph=True)
    for one, grad in zip(actual, grads, strict=True):
        assert torch.allclose(one, torch.autograd.grad(y, layer.light_up, grad, retain_graph=True)[0], atol=1e-5)


def test_compiled_autograd():
    torch.manual_seed(0)
    layer, x = midl.MIDLinear(12, 32, rank=3, group_size=4, noise=0.0), torch.randn(5, 12)
    layer(x).square().sum().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        layer(x).square().sum().backward()
    for p, wanted in zip(layer.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, wanted, atol=1e-5)
