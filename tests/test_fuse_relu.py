"""fuse_relu_: packed layers compute the ReLU behind them, with the same bits, and never where someone else looks on."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import midl
from midl.errors import MIDLError
from midl.ops.dispatch import unavailable_reason

if unavailable_reason("native"):
    pytest.skip(f"native kernels: {unavailable_reason('native')}", allow_module_level=True)

from midl.serving import PackedMIDLinear, PackedReLU, PackedSequential, fuse_relu_, pack_, unpack_


def randomise(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.eval()


def make_mlp(in_features=33, width=60, group_size=20, **choices) -> nn.Sequential:
    choices = {"active": 0.5, "rank": 5, "group_size": group_size, **choices}
    return randomise(
        nn.Sequential(
            midl.MIDLinear(in_features, width, **choices), nn.ReLU(), midl.MIDLinear(width, width, **choices),
            nn.ReLU(inplace=True), nn.Linear(width, 3, dtype=choices.get("dtype")),
        )
    )  # fmt: skip


def make_cnn() -> nn.Sequential:
    layer = midl.MIDConv2d(12, 48, 3, padding=1, active=0.5, rank=5, group_size=16)
    return randomise(nn.Sequential(layer, nn.ReLU(), nn.Conv2d(48, 4, 1)))


@pytest.mark.usefixtures("each_instruction_set", "poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("in_features", "width", "group_size"), [(40, 96, 16), (33, 60, 20), (17, 250, 50)])
@torch.no_grad()
def test_linear_layers_keep_their_bits(dtype, in_features, width, group_size):
    model = make_mlp(in_features, width, group_size, dtype=dtype)
    pack_(model)
    inputs = [torch.randn(*shape, in_features).to(dtype) for shape in ((), (1,), (9,), (2, 7), (70,), (0,))]
    expected = [model(x) for x in inputs]
    assert fuse_relu_(model) == [("0", "1"), ("2", "3")]
    for _ in range(2):
        for x, y in zip(inputs, expected, strict=True):
            torch.testing.assert_close(model(x), y, rtol=0, atol=0)
    assert (model[0](inputs[2]) >= 0).all()
    with midl.record_activity(model):  # the general path
        torch.testing.assert_close(model(inputs[2]), expected[2], rtol=0, atol=0)


@pytest.mark.usefixtures("each_instruction_set", "poisoned_memory")
@torch.no_grad()
def test_convolutions_keep_their_bits():
    model = make_cnn()
    pack_(model)
    inputs = [torch.randn(shape) for shape in ((1, 12, 5, 7), (12, 4, 4), (3, 12, 9, 9))]
    expected = [model(x) for x in inputs]
    assert fuse_relu_(model) == [("0", "1")]
    for _ in range(2):
        for x, y in zip(inputs, expected, strict=True):
            assert torch.equal(model(x), y)
    with midl.record_activity(model):
        assert torch.equal(model(inputs[0]), expected[0])


@torch.no_grad()
def test_nan_and_infinity_pass_as_through_relu():
    model = make_mlp()
    x = torch.randn(3, 33)
    x[0, 0], x[1, 0], x[2, 0] = torch.nan, torch.inf, -torch.inf
    pack_(model)
    expected = model[1](model[0](x))
    fuse_relu_(model)
    torch.testing.assert_close(model[0](x), expected, rtol=0, atol=0, equal_nan=True)
    assert expected[0].isnan().all()


@torch.no_grad()
def test_unpacking_gives_the_relu_back():
    model = make_mlp()
    before = copy.deepcopy(model)
    relu, x = model[1], torch.randn(4, 33)
    pack_(model)
    expected = model(x)
    fuse_relu_(model)
    assert type(relu) is PackedReLU
    assert type(model) is PackedSequential
    assert fuse_relu_(model) == []
    unpack_(model[0])  # the layer alone
    assert type(relu) is nn.ReLU
    assert torch.equal(model(x), expected)
    unpack_(model)
    assert model[1] is relu
    assert type(model) is nn.Sequential
    assert [type(module) for module in model] == [type(module) for module in before]
    assert torch.equal(model(x), before(x))
    pack_(model)
    assert torch.equal(model[0](x), before[0](x))  # not fused any more
    assert fuse_relu_(model) == [("0", "1"), ("2", "3")]


def test_hooks_that_come_later_are_called_or_refused():
    model = make_mlp()
    pack_(model)
    fuse_relu_(model)
    with pytest.raises(MIDLError, match=r"PackedReLU: a hook: .* expected midl\.serving\.unpack_\(model\) first"):
        model[1].register_forward_hook(lambda module, inputs, output: None)
    seen = []
    handles = [
        model[0].register_forward_hook(lambda module, inputs, output: seen.append(module)),
        nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(type(module))),
    ]
    with torch.no_grad():
        model(torch.randn(4, 33))
    for handle in handles:
        handle.remove()
    assert seen.count(model[0]) == 1
    assert seen.count(PackedMIDLinear) == 2
    unpack_(model)
    model[1].register_forward_hook(lambda module, inputs, output: None)


@torch.no_grad()
def test_copies_pickles_and_budgets_of_a_fused_model():
    model = make_mlp()
    x = torch.randn(4, 33)
    pack_(model)
    plain = copy.deepcopy(model)
    fuse_relu_(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for active in (0.5, 1.0, 0.34):
            midl.set_active(plain, active)
            midl.set_active(other, active)
            assert torch.equal(other(x), plain(x))
        unpack_(other)
        assert type(other[1]) is nn.ReLU
    assert type(model[1]) is PackedReLU


class Shared(nn.Module):
    """Both layers' outputs are also taken by others; one ReLU is called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (midl.MIDLinear(32, 32, rank=4, group_size=16) for _ in range(2))
        self.relu, self.other = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = self.other(h) + h
        return self.relu(self.second(y)) + self.relu(x)


@torch.no_grad()
def test_what_others_take_or_watch_is_left_alone():
    model = randomise(Shared())
    pack_(model)
    assert fuse_relu_(model) == []
    hooked = make_mlp()
    pack_(hooked)
    hooked[1].register_forward_hook(lambda module, inputs, output: None)
    hooked[2].register_forward_pre_hook(lambda module, inputs: None)
    assert fuse_relu_(hooked) == []
    with pytest.raises(MIDLError, match=r"an nn\.ReLU without hooks"):
        fuse_relu_(hooked, [("0", "1")])
    assert fuse_relu_(make_mlp()) == []  # not packed


class Untraceable(nn.Module):
    """torch.fx cannot follow it."""

    def __init__(self):
        super().__init__()
        self.layers = make_mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) if x.sum() > 0 else self.layers(-x)


@torch.no_grad()
def test_pairs_may_be_named():
    model = Untraceable().eval()
    pack_(model)
    x = torch.randn(4, 33)
    expected = model(x)
    with pytest.raises(MIDLError, match=r"fuse_relu_: torch\.fx cannot follow .* expected the names"):
        fuse_relu_(model)
    assert fuse_relu_(model, [("layers.2", "layers.3")]) == [("layers.2", "layers.3")]
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("0", "9")], "no module '9', expected one of"),
        ([("0", "1"), ("2", "1")], r"\['1'\] more than once"),
        ([("0", "4")], r"is a PackedMIDLinear and a Linear, expected a layer that midl\.serving\.pack_ packed"),
        ([("4", "3")], r"is a Linear and a ReLU, expected"),
    ],
)
def test_wrong_pairs_are_errors_and_change_nothing(pairs, message):
    model = make_mlp()
    pack_(model)
    with pytest.raises(MIDLError, match=rf"fuse_relu_: .*{message}"):
        fuse_relu_(model, pairs)
    assert type(model[1]) is nn.ReLU


def test_not_a_module_is_an_error():
    with pytest.raises(MIDLError, match="fuse_relu_: model is a NoneType, expected"):
        fuse_relu_(None)  # type: ignore[arg-type]
