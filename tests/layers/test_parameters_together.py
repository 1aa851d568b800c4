"""Parameters of another dtype or device than the layer's, and others that the fast paths must not take."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import midl
from midl.errors import DTypeError, MIDLError
from midl.serving import pack_, unpack_

LAYERS = {
    "linear": (lambda: midl.MIDLinear(64, 128, active=0.5, group_size=16), (5, 64)),
    "conv2d": (lambda: midl.MIDConv2d(16, 32, 3, padding=1, active=0.5, group_size=8), (2, 16, 6, 6)),
    "ffn": (lambda: midl.MIDFFN(64, 128, active=0.5, group_size=16), (5, 64)),
}


@pytest.fixture(params=LAYERS)
def layer_and_input(request):
    torch.manual_seed(0)
    build, shape = LAYERS[request.param]
    return build().eval(), torch.randn(shape)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_parameter_of_another_dtype_is_named(layer_and_input, dtype, grad):
    layer, x = layer_and_input
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            layer(x)
        for name, parameter in layer.named_parameters():
            if name != "weight" and "." not in name:
                before = parameter.data
                parameter.data = before.to(dtype)
                with pytest.raises(DTypeError, match=f"{name} has dtype {dtype}, expected torch.float32"):
                    layer(x)
                parameter.data = before


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("rows", ["same", "more"])
def test_a_parameter_of_another_shape_is_named_not_read_past_its_end(layer_and_input, grad, rows):
    layer, x = layer_and_input
    with torch.set_grad_enabled(grad):
        for _ in range(4):
            layer(x)  # packed and prepared
        if rows == "more":  # which no call was prepared for
            x = torch.cat((x, x))
        for name, parameter in layer.named_parameters():
            before = parameter.data
            parameter.data = before[: len(before) // 2].clone()
            with pytest.raises(MIDLError, match=f"{name} has shape .*, expected "):
                layer(x)
            parameter.data = before
        layer(x)


def test_parameters_without_values_are_named_not_read():
    with torch.device("meta"):
        layer = midl.MIDLinear(64, 128, active=0.5, group_size=16)
    layer.load_state_dict(nn.Linear(64, 128).state_dict(), strict=False, assign=True)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(MIDLError, match="light_down is on the meta device"):
            layer(torch.randn(5, 64))


@pytest.mark.parametrize("name", ["bias", "gate_bias", "light_down", "gate_weight"])
def test_pruned_and_parametrized_parameters_run_again_and_again(layer_and_input, name):
    layer, x = layer_and_input
    if getattr(layer, name, None) is None:
        pytest.skip(f"no {name}")
    prune.random_unstructured(layer, name, 0.3)
    with midl.kernels("reference"), torch.no_grad():
        expected = layer(x)
    with torch.no_grad():
        for _ in range(5):
            assert torch.allclose(layer(x), expected, atol=1e-4)


def test_cached_parametrizations(layer_and_input):
    layer, x = layer_and_input
    parametrize.register_parametrization(layer, "light_up", nn.Identity())
    expected = layer(x)
    with torch.no_grad(), parametrize.cached():
        for _ in range(4):
            assert torch.allclose(layer(x), expected, atol=1e-4)


MASKS = {
    "every other column": lambda n, d: torch.arange(d) % 2 == 1,
    "every other row": lambda n, d: (torch.arange(n) % 2 == 1)[:, None],
    "a third of the rows": lambda n, d: torch.rand(n, 1) < 1 / 3,
    "an eighth of the elements": lambda n, d: torch.rand(n, d) < 1 / 8,
    "a tenth of the rows, side by side": lambda n, d: (torch.arange(n) // (n // 10) == 5)[:, None],
}


@functools.cache  # it begins with an SVD
def wide_layer(*shape):
    return midl.MIDLinear(*shape, group_size=16, gate="light", interpolation="hard").eval()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", [(256, 512), (784, 1024), (1024, 512)])
def test_masks_through_data_are_seen(shape, mask):
    torch.manual_seed(0)
    layer = copy.deepcopy(wide_layer(*shape))
    x = torch.randn(4, shape[0])
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        layer.weight.data.masked_fill_(MASKS[mask](*layer.weight.shape), 0)
        actual = layer(x)
        with midl.kernels("reference"):
            assert torch.allclose(actual, layer(x), atol=1e-3)


def test_an_optimizer_goes_on_after_packing():
    torch.manual_seed(0)
    model = nn.Sequential(midl.MIDLinear(64, 128, active=0.5, group_size=16))
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    before = [(id(p), p.detach().clone(), p.requires_grad) for p in model.parameters()]
    pack_(model.eval())
    unpack_(model)
    for p, (identity, value, requires_grad) in zip(model.parameters(), before, strict=True):
        assert id(p) == identity
        assert torch.equal(p, value)
        assert p.requires_grad == requires_grad
    model.train()(torch.randn(8, 64)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before[0][1])


@pytest.mark.parametrize("grad", [False, True])
def test_inputs_of_other_layouts_are_errors(layer_and_input, grad):
    layer, x = layer_and_input
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            layer(x)
        with pytest.raises(MIDLError, match=r"input has layout torch\.sparse_coo, expected a dense tensor"):
            layer(x.to_sparse())
        zeros = torch._efficientzerotensor(x.shape)
        assert torch.allclose(layer(zeros), layer(torch.zeros(x.shape)), atol=1e-5)


def test_a_default_device_does_not_reach_the_layer(layer_and_input):
    layer, x = layer_and_input
    expected = layer(x)
    torch.set_default_device("meta")
    try:
        actual = layer(x)
    finally:
        torch.set_default_device(None)
    assert torch.equal(actual, expected)
