"""Construction and state: repr, state_dict, copies, meta tensors, dense weights in and out, the automatic rank."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from midl import MIDConfig, MIDConv2d, MIDLinear
from midl.config import layer_macs

choices = st.fixed_dictionaries(
    {},
    optional={
        "active": st.floats(0.01, 0.5),
        "rank": st.integers(1, 8),
        "flops_ratio": st.just(1.25),
        "group_size": st.sampled_from([1, 2, 4, 8]),
        "span": st.integers(1, 9),
        "gate": st.sampled_from(["projection", "light"]),
        "interpolation": st.sampled_from(["sigmoid", "hard"]),
        "ste": st.sampled_from(["dense", "selected"]),
        "noise": st.floats(0, 3),
    },
)


def rebuilt(layer):
    return eval(repr(layer), {"MIDLinear": MIDLinear, "MIDConv2d": MIDConv2d, "torch": torch})


def assert_same_layer(a, b):
    assert type(a) is type(b)
    assert a.config == b.config
    assert repr(a) == repr(b)
    assert {k: (v.shape, v.dtype) for k, v in a.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in b.state_dict().items()
    }


@settings(max_examples=60)
@given(choices, st.booleans(), st.sampled_from([None, torch.float32, torch.float64, torch.bfloat16]))
def test_repr_of_a_linear_layer_builds_it_again(choices, bias, dtype):
    layer = MIDLinear(64, 48, bias, dtype=dtype, **choices)
    assert_same_layer(rebuilt(layer), layer)


@settings(max_examples=40)
@given(
    choices,
    st.sampled_from([{}, {"padding": (1, 0)}, {"padding": "same", "padding_mode": "reflect"}, {"stride": (2, 1)}]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_repr_of_a_convolution_builds_it_again(choices, geometry, dtype):
    if choices.get("span") == 1:
        choices = {**choices, "select": "image"}
    layer = MIDConv2d(16, 24, (3, 2), dilation=2, bias=False, dtype=dtype, **geometry, **choices)
    again = rebuilt(layer)
    assert_same_layer(again, layer)
    x = torch.randn(1, 16, 8, 8, dtype=dtype)
    assert again(x).shape == layer(x).shape


def test_repr_follows_a_changed_budget():
    layer = MIDLinear(64, 48)
    layer.active = 0.2
    again = rebuilt(layer)
    assert again.active == 0.2
    assert again.rank == layer.rank
    assert again.num_selected == layer.num_selected == 10


def test_keywords_override_the_configuration():
    config = MIDConfig(active=0.3, group_size=8)
    layer = MIDLinear(64, 48, config=config, group_size=4)
    assert (layer.active, layer.config.group_size) == (0.3, 4)
    assert config.group_size == 8


def test_state_dict_has_the_names_and_shapes_of_the_formula():
    linear = MIDLinear(64, 48, rank=5, group_size=4)
    assert {k: tuple(v.shape) for k, v in linear.state_dict().items()} == {
        "weight": (48, 64), "bias": (48,), "light_down": (5, 64), "light_up": (48, 5), "gate_weight": (12, 5),
        "gate_bias": (12,),
    }  # fmt: skip
    conv = MIDConv2d(6, 8, (3, 2), rank=5, group_size=4)
    assert {k: tuple(v.shape) for k, v in conv.state_dict().items()} == {
        "weight": (8, 6, 3, 2), "bias": (8,), "light_down": (5, 6, 3, 2), "light_up": (8, 5), "gate_weight": (2, 5),
        "gate_bias": (2,),
    }  # fmt: skip
    assert list(MIDLinear(64, 48, bias=False, gate="light").state_dict()) == ["weight", "light_down", "light_up"]


def test_state_dict_round_trips_through_a_file():
    layer, other = MIDLinear(64, 48, rank=5), MIDLinear(64, 48, rank=5)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize(
    ("dense", "build"),
    [(nn.Linear(64, 48), lambda: MIDLinear(64, 48)), (nn.Conv2d(16, 24, 3), lambda: MIDConv2d(16, 24, 3))],
    ids=["linear", "conv2d"],
)
def test_a_dense_state_dict_loads_by_name(dense, build):
    layer = build()
    result = layer.load_state_dict(dense.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys == ["light_down", "light_up", "gate_weight", "gate_bias"]
    assert torch.equal(layer.weight, dense.weight)
    assert torch.equal(layer.bias, dense.bias)


@pytest.mark.parametrize(
    "layer", [MIDLinear(16, 32, rank=4, noise=1.0), MIDConv2d(8, 16, 3, rank=4)], ids=["linear", "conv2d"]
)
def test_a_deep_copy_is_equal_and_independent(layer):
    other = copy.deepcopy(layer)
    assert_same_layer(other, layer)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), other.parameters(), strict=True))
    other.active = 0.1
    with torch.no_grad():
        other.weight.zero_()
    assert layer.active == 0.45
    assert bool(layer.weight.any())


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda device: MIDLinear(16, 32, rank=4, device=device), (3, 16)),
        (lambda device: MIDLinear(16, 32, rank=4, span=2, gate="light", device=device), (2, 3, 16)),
        (lambda device: MIDConv2d(8, 16, 3, padding=1, rank=4, device=device), (2, 8, 5, 5)),
        (lambda device: MIDConv2d(8, 16, 3, rank=4, select="image", device=device), (2, 8, 5, 5)),
    ],
)
def test_meta_layers_take_no_memory_give_shapes_and_materialise(build, shape):
    layer = build("meta")
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    y = layer(torch.empty(shape, device="meta"))
    assert y.is_meta
    with torch.no_grad():
        assert layer(torch.empty(shape, device="meta")).shape == y.shape
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer(torch.randn(shape)).shape == y.shape
    assert all(bool(p.isfinite().all()) for p in layer.parameters())


def test_the_device_and_dtype_of_a_context_apply():
    with torch.device("meta"):
        assert MIDLinear(64, 128).weight.is_meta
    assert MIDLinear(64, 128).double().light_down.dtype == torch.float64
    assert MIDLinear(64, 128).to(torch.bfloat16)(torch.randn(3, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("build", [lambda: MIDLinear(16, 32, rank=4), lambda: MIDConv2d(4, 8, 3, rank=4)])
def test_reset_parameters_draws_what_the_dense_layer_draws_and_repeats_with_the_seed(build):
    torch.manual_seed(3)
    layer = build()
    torch.manual_seed(3)
    dense = nn.Linear(16, 32) if isinstance(layer, MIDLinear) else nn.Conv2d(4, 8, 3)
    assert torch.equal(layer.weight, dense.weight)
    assert torch.equal(layer.bias, dense.bias)
    before = copy.deepcopy(layer.state_dict())
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before["weight"])
    torch.manual_seed(3)
    layer.reset_parameters()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_light_path_starts_as_the_best_low_rank_fit(dtype):
    layer = MIDLinear(16, 32, rank=4, dtype=dtype)
    weight, fit = layer.weight.double(), (layer.light_up.double() @ layer.light_down.double())
    singular = torch.linalg.svdvals(weight)
    best = singular[4:].square().sum().sqrt()
    assert (weight - fit).norm() <= best * (1 + (1e-3 if dtype != torch.bfloat16 else 5e-2))


@pytest.mark.parametrize("group_size", [1, 8])
def test_the_gate_starts_as_the_mean_light_output_of_its_group(group_size):
    layer = MIDLinear(16, 32, rank=4, group_size=group_size)
    light = MIDLinear(16, 32, rank=4, group_size=group_size, gate="light")
    light.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(9, 16)
    torch.testing.assert_close(layer(x), light(x))


@pytest.mark.parametrize("training", [True, False])
def test_from_linear_and_from_conv2d_keep_parameters_mode_and_dtype(training):
    for dense, layer_type in (
        (nn.Linear(16, 32, bias=False, dtype=torch.float64), MIDLinear.from_linear),
        (nn.Conv2d(4, 8, 3, stride=2, padding=1, dtype=torch.float64), MIDConv2d.from_conv2d),
    ):
        layer = layer_type(dense.train(training), rank=2)
        assert layer.weight is dense.weight
        assert layer.bias is dense.bias
        assert layer.training is training
        assert {p.dtype for p in layer.parameters()} == {torch.float64}
        assert all(bool(p.isfinite().all()) for p in layer.parameters())


@settings(max_examples=60)
@given(
    st.integers(16, 80), st.integers(2, 10), st.sampled_from([1, 8]), st.floats(0.05, 0.5), st.floats(1.0, 1.5),
    st.sampled_from(["projection", "light"]),
)  # fmt: skip
def test_the_automatic_rank_is_the_largest_within_the_budget(d, groups, size, active, ratio, gate):
    n = 8 * groups * size
    layer = MIDLinear(d, n, active=active, group_size=size, flops_ratio=ratio, gate=gate, device="meta")

    def macs(rank):
        return layer_macs(d, n, rank, num_selected=layer.num_selected, group_size=size, gate=gate)

    assert macs(layer.rank) * ratio <= d * n * (1 + 1e-12)
    assert layer.rank == min(d, n) or macs(layer.rank + 1) * ratio > d * n * (1 - 1e-12)
    assert layer.config.rank == layer.rank


def test_the_automatic_rank_of_a_convolution_counts_the_whole_window():
    layer = MIDConv2d(32, 64, 3, group_size=4)

    def macs(rank):
        return layer_macs(288, 64, rank, num_selected=layer.num_selected, group_size=4, gate="projection")

    assert macs(layer.rank) <= 288 * 64 / 1.7 < macs(layer.rank + 1)


def test_the_rank_stays_when_the_budget_changes():
    layer = MIDLinear(64, 128)
    rank = layer.rank
    layer.active = 0.9
    assert layer.rank == layer.config.rank == rank
    assert layer(torch.randn(2, 64)).shape == (2, 128)
