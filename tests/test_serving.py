"""Packed layers: the same bits on less memory, every plain weight back on demand, and no silent half-working state."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import midl
from midl.errors import KernelError, MIDLError
from midl.ops.dispatch import unavailable_reason

if unavailable_reason("native"):
    pytest.skip(f"native kernels: {unavailable_reason('native')}", allow_module_level=True)

from midl.ops import native
from midl.serving import PackedMIDConv2d, PackedMIDFFN, PackedMIDLinear, pack_, unpack_


def make(in_features=40, out_features=96, group_size=16, **choices):
    layer = midl.MIDLinear(in_features, out_features, active=0.5, rank=7, group_size=group_size, **choices)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.eval()


def make_conv(channels=12, out_channels=48, kernel_size=3, group_size=16, **choices):
    layer = midl.MIDConv2d(
        channels, out_channels, kernel_size, active=0.5, rank=7, group_size=group_size, **{"padding": 1, **choices}
    )
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.eval()


def make_ffn(in_features=40, hidden_features=96, out_features=24, group_size=16, **choices):
    layer = midl.MIDFFN(
        in_features, hidden_features, out_features, active=0.5, rank=7, group_size=group_size,
        **{"gated": True, "activation": "silu", **choices},
    )  # fmt: skip
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.eval()


def native_outputs(layer, inputs):
    """By the kernels, from the second call on by panels."""
    with midl.kernels("native"):
        for x in inputs * 2:
            layer(x)
        return [layer(x) for x in inputs]


def served_bytes(model):
    held = sum(p.nbytes for p in model.parameters() if not p.is_meta)
    packed = (PackedMIDLinear, PackedMIDConv2d, PackedMIDFFN)
    return held + sum(t.nbytes for m in model if isinstance(m, packed) for t in m._panels._panels())


@pytest.mark.usefixtures("each_instruction_set", "poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("in_features", "out_features", "group_size"), [(40, 96, 16), (33, 60, 20), (17, 250, 50)])
@pytest.mark.parametrize("span", [1, 3])
@torch.no_grad()
def test_a_packed_layer_has_the_same_bits_and_gives_every_weight_back(
    dtype, in_features, out_features, group_size, span
):
    layer = make(in_features, out_features, group_size, dtype=dtype, span=span)
    parameters = {name: p.clone() for name, p in layer.named_parameters()}
    inputs = [torch.randn(shape, in_features).to(dtype) for shape in (1, 9)] + [
        torch.randn(2, 7, in_features).to(dtype)
    ]
    expected = native_outputs(layer, inputs)
    assert pack_(layer) == [""]
    for x, y in zip(inputs, expected, strict=True):
        assert torch.equal(layer(x), y)
    assert layer(inputs[0][:0]).shape == (0, out_features)
    layer.active = 0.25
    assert not torch.equal(layer(inputs[1]), expected[1])
    layer.active = 0.5
    assert unpack_(layer) == [""]
    assert type(layer) is midl.MIDLinear
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, parameters[name])
        assert parameter.requires_grad
    with torch.enable_grad():
        layer.train()(torch.randn(3, in_features).to(dtype)).sum().backward()


@pytest.mark.usefixtures("each_instruction_set", "poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"channels": 5, "kernel_size": (3, 2), "stride": 2, "dilation": (1, 2), "group_size": 12, "bias": False},
        {"out_channels": 150, "group_size": 50, "select": "image"},
        {"span": 3, "padding": "same", "padding_mode": "reflect"},
        {"padding": "same", "kernel_size": 2},
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_a_packed_convolution_has_the_same_bits_and_gives_every_weight_back(dtype, choices, memory_format):
    layer = make_conv(dtype=dtype, **choices).to(memory_format=memory_format)
    parameters = {name: p.clone() for name, p in layer.named_parameters()}
    strides = {name: p.stride() for name, p in layer.named_parameters()}
    inputs = [torch.randn(batch, layer.in_channels, *size) for batch, *size in ((1, 9, 7), (3, 6, 8))]
    inputs = [x.to(dtype) for x in (*inputs, inputs[1].contiguous(memory_format=torch.channels_last), inputs[1][0])]
    expected = native_outputs(layer, inputs)
    assert pack_(layer) == ([""] if native.multiplies_as_is(dtype) else [])
    for x, y in zip(inputs * 2, expected * 2, strict=True):
        with midl.kernels("native"):
            assert torch.equal(layer(x), y)
    if not native.multiplies_as_is(dtype):
        return
    assert layer(inputs[0][:0]).shape == (0, *expected[0].shape[1:])
    layer.active = 1.0
    assert not torch.equal(layer(inputs[1]), expected[1])
    layer.active = 0.5
    assert unpack_(layer) == [""]
    assert type(layer) is midl.MIDConv2d
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, parameters[name])
        assert parameter.stride() == strides[name]
    with torch.enable_grad():
        layer.train()(inputs[1]).sum().backward()


@pytest.mark.usefixtures("each_instruction_set", "poisoned_memory")
@pytest.mark.parametrize(
    "choices",
    [
        {"group_size": 8},
        {"in_features": 33, "hidden_features": 120, "group_size": 12, "gated": False, "bias": False},
        {"out_features": 77, "group_size": 48, "interpolation": "hard", "threshold": 0.1},
        {"out_features": 77, "group_size": 24, "dtype": torch.bfloat16},
        {"in_features": 33, "hidden_features": 90, "group_size": 9, "gated": False, "dtype": torch.bfloat16},
    ],
)
@torch.no_grad()
def test_a_packed_ffn_has_the_same_bits_and_gives_every_weight_back(choices):
    layer = make_ffn(**choices)
    parameters = {name: p.clone() for name, p in layer.named_parameters()}
    dtype = layer.weight.dtype
    inputs = [torch.randn(*shape, layer.in_features, dtype=dtype) for shape in ((1,), (9,), (2, 70), (0,))]
    expected = native_outputs(layer, inputs)
    assert pack_(layer) == [""]
    for x, y in zip(inputs * 2, expected * 2, strict=True):
        assert torch.equal(layer(x), y)
        with midl.record_activity(layer):  # the general path
            assert torch.equal(layer(x), y)
    layer.active = 0.25
    assert not torch.equal(layer(inputs[1]), expected[1])
    layer.active = 0.5
    assert unpack_(layer) == [""]
    assert type(layer) is midl.MIDFFN
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, parameters[name])
        assert parameter.requires_grad
    with torch.enable_grad():
        layer.train()(inputs[1]).sum().backward()


@torch.no_grad()
@pytest.mark.parametrize(
    ("layer", "x"),
    [(make(), torch.randn(5, 40)), (make_conv(), torch.randn(2, 12, 5, 5)), (make_ffn(), torch.randn(5, 40))],
)
def test_biases_stay_alive_and_may_be_replaced(layer, x):
    def expected():
        unpack_(layer)
        (y,) = native_outputs(layer, [x])
        pack_(layer)
        return y

    pack_(layer)
    layer(x)
    calls = ("calls", "linear_call", "prepared")
    assert any(getattr(layer._panels, name, None) for name in calls)  # what follows is about prepared calls
    for change in (
        lambda: layer.bias.mul_(2),
        lambda: layer.gate_bias.copy_(torch.randn(len(layer.gate_bias))),
        lambda: setattr(layer, "bias", nn.Parameter(torch.randn(len(layer.bias)))),
        lambda: setattr(layer.bias, "data", torch.randn(len(layer.bias))),
        lambda: setattr(layer, "bias", None),
    ):
        change()
        assert torch.equal(layer(x), layer(x))
        assert torch.equal(layer(x), expected())
    groups = len(layer.gate_bias)
    for active in (0.5, 0.25):  # also where the call is prepared anew
        layer.active = active
        for wrong in (torch.randn(groups + 1), torch.randn(groups, dtype=torch.float64)):
            layer.gate_bias = nn.Parameter(wrong)
            with pytest.raises(MIDLError, match=r"gate_bias has .*expected"):
                layer(x)


@torch.no_grad()
def test_the_light_gate_and_layers_without_bias():
    layer, x = make(gate="light", bias=False), torch.randn(5, 40)
    (expected,) = native_outputs(layer, [x])
    before = layer.light_up.clone()
    assert pack_(layer) == [""]
    assert torch.equal(layer(x), expected)
    unpack_(layer)
    assert torch.equal(layer.light_up, before)


def test_the_plain_weights_are_gone():
    model = nn.Sequential(
        make(256, 512, 32), make_conv(32, 128, group_size=32), make_ffn(128, 512, 128, 32, gated=False)
    )
    plain = sum(p.nbytes for p in model.parameters())
    pack_(model)
    assert served_bytes(model) < 1.2 * plain
    for layer in model:
        assert all(getattr(layer, name).is_meta for name in ("weight", "light_down", "light_up", "gate_weight"))


def test_layers_that_need_their_plain_weights_keep_them():
    shared = make()
    tied = make()
    tied.weight = shared.weight
    model = nn.Sequential(
        make(group_size=1), make(dtype=torch.float64), make(gate="light", dtype=torch.bfloat16), shared, tied,
        nn.utils.parametrizations.orthogonal(make(96, 96)), nn.Linear(3, 3), make(), make_ffn(group_size=4),
        make_ffn(dtype=torch.float64),
    ).eval()  # fmt: skip
    assert pack_(model) == ["7"]
    assert pack_(model) == []
    assert unpack_(model) == ["7"]
    assert unpack_(model) == []


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("train", lambda m: m.train()),
        ("state_dict", lambda m: m.state_dict()),
        ("state_dict", lambda m: copy.deepcopy(m).state_dict()),
        ("load_state_dict", lambda m: m.load_state_dict(nn.Sequential(make()).state_dict())),
        ("to", lambda m: m.double()),
        ("to", lambda m: m.to(torch.bfloat16)),
        ("to_linear", lambda m: midl.revert_(m)),
        ("forward", lambda m: m(torch.randn(2, 40, requires_grad=True))),
        ("forward", lambda m: midl.count_flops(m, torch.randn(2, 40))),
        ("state_dict", lambda m: midl.save(m, "/dev/null")),
    ],
)
def test_what_needs_the_plain_weights_names_the_way_back(what, call):
    model = nn.Sequential(make()).eval()
    pack_(model)
    with pytest.raises(MIDLError, match=rf"{what}.*midl\.serving\.unpack_\(model\) first"):
        call(model)
    unpack_(model)


@torch.no_grad()
@pytest.mark.parametrize(
    ("layer", "x"),
    [(make(), torch.randn(3, 40)), (make_conv(), torch.randn(2, 12, 5, 5)), (make_ffn(), torch.randn(3, 40))],
)
def test_copies_pickles_and_watchers_of_a_packed_model(layer, x):
    model = nn.Sequential(layer).eval()
    pack_(model)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
        unpack_(other)
    with midl.record_activity(model) as activity:
        model(x)
    assert activity["0"].usage.sum() > 0


@torch.no_grad()
def test_wrong_uses_are_errors():
    model = nn.Sequential(make())
    with pytest.raises(MIDLError, match=r"\['0'\] are in training mode, expected model\.eval"):
        pack_(model.train())
    pack_(model.eval())
    for x in (torch.randn(3, 39), torch.randn(3, 40).double(), torch.tensor(1.0), None):
        with pytest.raises(MIDLError, match="MIDLinear: input"):
            model(x)
    ffn = make_ffn()
    pack_(ffn)
    for x in (torch.randn(3, 39), torch.randn(3, 40).double(), torch.tensor(1.0), None):
        with pytest.raises(MIDLError, match="MIDFFN: input"):
            ffn(x)
    convolution = make_conv()
    pack_(convolution)
    for x in (torch.randn(3, 11, 5, 5), torch.randn(3, 12, 5, 5).double(), torch.tensor(1.0), torch.randn(5, 5), None):
        with pytest.raises(MIDLError, match="MIDConv2d: input"):
            convolution(x)
    with pytest.raises(MIDLError, match=r"is smaller than kernel_size=\(3, 3\)"):
        convolution(torch.randn(1, 12, 1, 0))
    with pytest.raises(MIDLError, match="autocast"), torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(3, 40))
    before = native.instruction_set()
    native.use_instruction_set("baseline")
    try:
        with pytest.raises(KernelError, match="the instruction set is 'baseline', expected"):
            model(torch.randn(3, 40))
    finally:
        native.use_instruction_set(before)
