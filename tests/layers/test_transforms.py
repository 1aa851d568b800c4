"""torch.func and inference mode on MID-L layers: what works equals the plain call, what cannot is an error."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vjp, vmap

import midl
from midl.errors import KernelError


@pytest.fixture
def model():
    return nn.Sequential(midl.MIDLinear(12, 32, rank=2, group_size=4), nn.ReLU(), midl.MIDLinear(32, 16, rank=2))


@pytest.fixture
def x():
    return torch.randn(5, 12)


def test_functional_call(model, x):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(functional_call(model, dict(other.named_parameters()), (x,)), other(x))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_inputs_and_over_an_ensemble(model, x):
    torch.testing.assert_close(vmap(model)(x), model(x))
    xs = torch.randn(5, 3, 12)
    torch.testing.assert_close(vmap(model, in_dims=1, out_dims=1)(xs), model(xs))
    models = [model, copy.deepcopy(model)]
    with torch.no_grad():
        models[1][0].weight.neg_()
    parameters, _ = stack_module_state(models)
    outputs = vmap(lambda p: functional_call(model, p, (x,)))(parameters)
    torch.testing.assert_close(outputs, torch.stack([m(x) for m in models]))


def test_vmap_over_images():
    layer, x = midl.MIDConv2d(3, 8, 3, rank=2), torch.randn(2, 4, 3, 6, 6)
    torch.testing.assert_close(vmap(layer)(x), layer(x.flatten(0, 1)).unflatten(0, (2, 4)))


def test_reverse_mode_transforms_are_an_error_that_says_what_works(model, x):
    def loss(parameters, x):
        return functional_call(model, parameters, (x,)).sum()

    for transform in (
        lambda: grad(loss)(dict(model.named_parameters()), x),
        lambda: vmap(grad(loss), in_dims=(None, 0))(dict(model.named_parameters()), x),
        lambda: jacrev(model)(x),
        lambda: vjp(model, x),
    ):
        with pytest.raises(KernelError, match=r"expected backward\(\) or torch.autograd.grad"):
            transform()


@pytest.mark.parametrize("make", [lambda: midl.MIDLinear(6, 8, rank=2), lambda: midl.MIDConv2d(6, 8, 1, rank=2)])
def test_forward_mode_is_an_error_and_not_a_tangent_of_zero(make):
    layer, x = make(), torch.randn(2, 6, 3, 6)
    with pytest.raises(KernelError, match="forward-mode derivatives"):
        jvp(layer, (x,), (x,))
    layer.requires_grad_(False)
    with forward_ad.dual_level():
        with pytest.raises(KernelError, match="forward-mode derivatives"):
            layer(forward_ad.make_dual(x, x))
        assert layer(x).shape[1] == (6 if isinstance(layer, midl.MIDLinear) else 8)


def test_inference_mode_gives_the_same_output_and_its_inputs_serve_outside(model, x):
    expected = model(x)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)
        inside = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(model(inside), expected)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        model(inside)


def test_a_model_converted_under_inference_mode_evaluates_outside(x):
    model = nn.Sequential(nn.Linear(12, 32)).eval()
    with torch.inference_mode():
        midl.convert_(model, midl.MIDConfig(rank=2))
        expected = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
