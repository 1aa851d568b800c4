"""MIDFFN: the layer around midl::ffn, its budget, its state, compilation, and rows that harm only themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import midl
from midl import MIDFFN, MIDConfig, MIDLinear
from midl.errors import DTypeError, MIDLError
from midl.layers.ffn import DenseFFN

CHOICES = [
    {},
    {"activation": "silu", "gated": True, "bias": False, "interpolation": "hard"},
    {"activation": "relu", "group_size": 4, "ste": "dense"},
]


@pytest.fixture(autouse=True, params=["reference", "auto"])
def _kernels(request):
    midl.kernels(request.param)


def dense_output(layer, x):
    return layer.to_dense()(x)


@pytest.mark.parametrize("choices", CHOICES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (7, 5), (2, 0, 3)])
def test_any_leading_shape_and_every_parameter_gets_a_gradient(choices, shape):
    layer = MIDFFN(16, 32, 8, rank=4, **choices)
    x = torch.randn(*shape, 16, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape, 8)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad.shape == p.shape for p in layer.parameters())


@pytest.mark.parametrize("choices", [c for c in CHOICES if c], ids=str)
def test_with_everything_active_and_hard_it_is_the_dense_ffn(choices):
    layer = MIDFFN(16, 32, rank=4, dtype=torch.float64, **{**choices, "active": 1.0, "interpolation": "hard"})
    nn.init.normal_(layer.light_up)  # has no share in the output when nothing is left out
    x = torch.randn(6, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense_output(layer, x), rtol=1e-12, atol=1e-12)


def test_the_layers_that_it_is_made_from_keep_their_parameters():
    up, value, down = nn.Linear(16, 32, bias=False), nn.Linear(16, 32), nn.Linear(32, 8)
    layer = MIDFFN.from_linears(up, down, value=value, activation="silu", active=1.0, interpolation="hard", rank=4)
    x = torch.randn(3, 16)
    torch.testing.assert_close(layer(x), down(nn.functional.silu(up(x)) * value(x)), rtol=1e-5, atol=1e-6)
    assert layer.value_bias is value.bias
    assert layer.bias is None
    assert "".join(layer.state_dict()) == "".join(MIDFFN.from_linears(
        up, down, value=value, activation="silu", rank=4).state_dict())  # fmt: skip


def test_an_untrained_gate_finds_units_that_are_on():
    # Weights of rank 2: the gate's guess of the pre-activations is exact, and off units add nothing after ReLU.
    up, down = nn.Linear(16, 64), nn.Linear(64, 16)
    with torch.no_grad():
        up.weight.copy_(torch.randn(64, 2) @ torch.randn(2, 16))
        down.weight.div_(down.weight.norm(dim=0))
    layer = MIDFFN.from_linears(up, down, activation="relu", rank=2, active=0.8, interpolation="hard")
    x = torch.randn(50, 16)
    torch.testing.assert_close(layer(x), down(up(x).relu()), rtol=1e-4, atol=1e-4)


def test_the_budget_counts_both_layers():
    d, m, n, r = 64, 256, 32, 8
    x = torch.zeros(5, d)
    for gated, ups in ((False, 1), (True, 2)):
        layer = MIDFFN(d, m, n, gated=gated, rank=r, group_size=4, active=0.25)
        expected = r * (d + n + m // 4) + m // 4 * (ups * d + n)
        assert layer.macs == expected
        assert midl.count_flops(layer, x) == 5 * 2 * expected
        assert midl.count_flops(layer.to_dense(), x) == 5 * 2 * layer.dense_macs == 5 * 2 * m * (ups * d + n)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("ratio", [1.4, 2.0])
def test_rank_auto_meets_the_ratio_and_one_more_would_break_it(gated, ratio):
    layer = MIDFFN(64, 256, gated=gated, active=0.3, flops_ratio=ratio, device="meta")
    assert layer.dense_macs / layer.macs >= ratio
    assert (layer.dense_macs / (layer.macs + 64 + 64 + 256) < ratio) or layer.rank == 64


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_a_row_with_nan_or_inf_harms_only_itself(choices, value):
    layer, x = MIDFFN(16, 32, rank=4, **choices), torch.randn(9, 16)
    nn.init.normal_(layer.light_up)
    clean = layer(x)
    x[4, 3] = value
    x = x.requires_grad_()
    y = layer(x)
    others = [i for i in range(9) if i != 4]
    assert torch.equal(y[others], clean[others])
    assert not y[4].isfinite().all()
    y[others].sum().backward()
    assert bool(x.grad[others].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_eval_is_train_without_noise_bit_for_bit(dtype):
    layer, x = MIDFFN(16, 32, rank=4, dtype=dtype, noise=3.0), torch.randn(9, 16, dtype=dtype)
    noisy = layer(x)
    expected = layer.eval()(x)
    layer.train()
    layer.config = layer.config.replace(noise=0.0)
    assert torch.equal(layer(x), expected)
    assert not torch.equal(noisy, expected)


def test_autocast_computes_in_its_dtype():
    layer, x = MIDFFN(16, 32, rank=4), torch.randn(3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.1, atol=0.1)


def test_activity_and_budget_see_it_beside_other_layers():
    model = nn.Sequential(MIDFFN(16, 32, rank=2), MIDLinear(16, 20, rank=2))
    midl.set_active(model, 0.25)
    with midl.record_activity(model) as activity:
        model(torch.randn(6, 16))
    assert activity["0"].fraction_active == 0.25
    assert activity["0"].choices == 6
    x = torch.zeros(1, 16)
    midl.set_active(model, flops_ratio=1.2, example_inputs=x)
    dense = 2 * (2 * 16 * 32 + 16 * 20)
    assert dense / midl.count_flops(model, x) >= 1.2


def test_the_representation_builds_the_layer_again():
    for choices in CHOICES:
        layer = MIDFFN(16, 32, 8, rank=4, **choices)
        again = eval(repr(layer), {"MIDFFN": MIDFFN, "torch": torch})
        assert again.config == layer.config
        assert {k: v.shape for k, v in again.state_dict().items()} == {
            k: v.shape for k, v in layer.state_dict().items()
        }


def test_copies_and_meta_devices():
    layer, x = MIDFFN(16, 32, rank=4), torch.randn(3, 16)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    with torch.device("meta"):
        assert MIDFFN(16, 32).down_weight.is_meta
    assert MIDFFN(16, 32, rank=2, device="meta")(x.to("meta")).shape == (3, 16)


def test_compiled_is_eager_and_a_new_batch_size_does_not_recompile_twice():
    torch._dynamo.reset()
    layer = MIDFFN(16, 32, rank=4, group_size=4, gated=True, activation="silu")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def run(model, x):
        x = x.detach().requires_grad_()
        y = model(x)
        return (y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))

    for batch, patch in ((4, False), (7, False), (9, True)):
        x = torch.randn(batch, 16)
        with torch._dynamo.config.patch(error_on_recompile=patch):
            ours = run(compiled, x)
        torch.testing.assert_close(ours, run(layer, x), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_training_reduces_the_loss_of_a_regression():
    teacher = DenseFFN(dict(MIDFFN(16, 32, rank=1).named_parameters())
                       | {"value_weight": None, "value_bias": None}, "gelu")  # fmt: skip
    layer = MIDFFN(16, 32, rank=4, group_size=4, active=0.5)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    x = torch.randn(256, 16)
    with torch.no_grad():
        target = teacher(x)
    losses = []
    for _ in range(100):
        loss = nn.functional.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MIDFFN(0, 8), "MIDFFN: in_features=0, expected a positive int"),
        (lambda: MIDFFN(8, 1.5), "MIDFFN: hidden_features=1.5, expected a positive int"),
        (lambda: MIDFFN(8, 16, 0), "MIDFFN: out_features=0, expected a positive int"),
        (lambda: MIDFFN(8, 16, activation="tanh"), "MIDFFN: activation='tanh', expected one of"),
        (lambda: MIDFFN(8, 16, gate="light"), "MIDFFN: gate='light', expected 'projection'"),
        (lambda: MIDFFN(8, 16, span=2), "MIDFFN: span=2, expected 1"),
        (lambda: MIDFFN(8, 30, group_size=4), "MIDFFN: group_size=4 does not divide hidden_features=30"),
        (lambda: MIDFFN(8, 32, 4, rank=5), r"MIDFFN: rank=5, expected at most min\(fan_in, out_features\)=4"),
        (lambda: MIDFFN(8, 32, active=0.9), "MIDFFN: rank='auto' finds no rank for active=0.9"),
        (lambda: MIDFFN.from_linears(nn.Linear(4, 8), nn.Linear(9, 4)), "do not make an FFN"),
        (lambda: MIDFFN.from_linears(nn.Linear(4, 8), nn.ReLU()), "down is a ReLU, expected nn.Linear"),
        (lambda: MIDFFN(8, 16, rank=2)(torch.randn(3, 9)), "has 9 features, expected 8"),
        (lambda: MIDFFN(8, 16, rank=2)(torch.tensor(1.0)), "input is 0-dimensional"),
    ],
)
def test_errors_name_what_came_and_what_was_expected(build, message):
    with pytest.raises(MIDLError, match=message):
        build()


def test_dtypes_that_do_not_fit():
    with pytest.raises(DTypeError, match=r"input has dtype torch\.float64, expected torch\.float32"):
        MIDFFN(8, 16, rank=2)(torch.randn(3, 8, dtype=torch.float64))
    with pytest.raises(DTypeError, match=r"dtype=torch\.int64"):
        MIDFFN(8, 16, dtype=torch.int64)


def test_one_configuration_object_serves_as_keywords_do():
    config = MIDConfig(active=0.25, rank=3, group_size=2)
    assert MIDFFN(16, 32, config=config).config == config
    assert MIDFFN(16, 32, config=config, active=0.5).active == 0.5
