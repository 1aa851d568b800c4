"""FLOPs as FlopCounterMode counts them against the formula of the method, two per multiply-add."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import midl
from midl import MIDConv2d, MIDLinear


@pytest.fixture(autouse=True, params=["reference", "dense"])
def _kernels(request):
    # The count is of the work that the method needs, whichever implementation does it.
    midl.kernels(request.param)


def count(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def backward_flops(layer, x):
    y = layer(x)
    return count(lambda: y.backward(torch.ones_like(y)))


@pytest.mark.parametrize(
    ("d", "n", "r", "size", "active"), [(64, 128, 8, 1, 0.45), (100, 600, 12, 4, 0.3), (63, 96, 1, 32, 1.0)]
)
@pytest.mark.parametrize("shape", [(), (7,), (7, 5), (0,)])
def test_linear_is_the_formula(d, n, r, size, active, shape):
    layer = MIDLinear(d, n, rank=r, group_size=size, active=active)
    rows, groups = torch.Size(shape).numel(), n // size
    k = max(1, round(active * groups))
    assert count(lambda: layer(torch.randn(*shape, d))) == 2 * rows * (r * d + r * n + r * groups + k * size * d)


def test_the_light_gate_costs_nothing():
    layer = MIDLinear(64, 128, rank=8, group_size=4, gate="light", active=0.5)
    assert count(lambda: layer(torch.randn(3, 64))) == 2 * 3 * (8 * 64 + 8 * 128 + 64 * 64)


def test_span_saves_gate_logits_and_counts_a_short_block():
    layer = MIDLinear(64, 128, rank=8, group_size=4, span=3, active=0.5)
    blocks = 2 * 3  # Seven positions in blocks of three, twice.
    expected = 2 * (14 * (8 * 64 + 8 * 128 + 64 * 64) + blocks * 8 * 32)
    assert count(lambda: layer(torch.randn(2, 7, 64))) == expected


@pytest.mark.parametrize(("choices", "blocks"), [({}, 2 * 4 * 5), ({"span": 2}, 2 * 4 * 3), ({"select": "image"}, 2)])
@pytest.mark.parametrize("gate", ["projection", "light"])
def test_conv2d_is_the_formula(choices, blocks, gate):
    layer = MIDConv2d(
        8, 16, (3, 2), stride=(2, 1), padding=(1, 0), rank=4, group_size=2, active=0.5, gate=gate, **choices
    )
    fan_in, positions = 8 * 3 * 2, 2 * 4 * 5
    expected = 2 * (positions * (4 * fan_in + 4 * 16 + 8 * fan_in) + blocks * 4 * 8 * (gate == "projection"))
    assert count(lambda: layer(torch.randn(2, 8, 8, 6))) == expected


def test_the_count_follows_the_budget():
    layer, x = MIDLinear(64, 128, rank=8), torch.randn(3, 64)
    layer.active = 0.25
    narrow = count(lambda: layer(x))
    layer.active = 0.75
    assert count(lambda: layer(x)) - narrow == 2 * 3 * 64 * 64


def test_the_default_layer_costs_at_most_the_promised_share_of_the_dense_one():
    for layer, dense, shape in (
        (MIDLinear(256, 512), torch.nn.Linear(256, 512), (5, 256)),
        (MIDConv2d(32, 64, 3, padding=1), torch.nn.Conv2d(32, 64, 3, padding=1), (2, 32, 6, 6)),
    ):
        x = torch.randn(shape)
        ratio = count(lambda x=x, dense=dense: dense(x)) / count(lambda x=x, layer=layer: layer(x))
        assert 1.7 <= ratio < 1.8  # One rank more of the small convolution costs 4 %.


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda ste: MIDLinear(64, 128, rank=8, ste=ste), (5, 64)),
        (lambda ste: MIDConv2d(8, 16, 3, padding=1, rank=4, ste=ste), (2, 8, 5, 5)),
    ],
    ids=["linear", "conv2d"],
)
def test_backward_of_the_selected_rule_recomputes_only_selected_neurons(build, shape):
    x = torch.randn(shape, requires_grad=True)
    sparse, dense = build("selected"), build("dense")
    n, rows = sparse.weight.shape[0], 5 if len(shape) == 2 else 2 * 25
    skipped = rows * (n - sparse.num_selected) * sparse.weight[0].numel()
    assert backward_flops(dense, x) - backward_flops(sparse, x) == 2 * skipped


def test_backward_is_the_formula_and_frozen_parameters_cost_nothing():
    d, n, r, groups, selected, rows = 64, 128, 8, 32, 16 * 4, 5
    layer = MIDLinear(d, n, rank=r, group_size=4, active=0.5)
    x = torch.randn(rows, d, requires_grad=True)
    recomputed = r * d + r * n + r * groups + selected * d
    through = r * n + r * groups
    grads = 2 * selected * d + 2 * r * d + r * n + r * groups  # Of x and weight, x and light_down, light_up, the gate.
    assert backward_flops(layer, x) == 2 * rows * (recomputed + through + grads)
    layer.requires_grad_(False)
    assert backward_flops(layer, x) == 2 * rows * (recomputed + through + selected * d + r * d)
