"""MIDLinear: the formula at the layer, any shape and layout, train and eval, and rows that harm only themselves."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import Options, assert_close_to_loop, plain_linear
from torch import nn

import midl
from midl import MIDLinear
from midl.layers.base import observers

CHOICES = [
    {},
    {"gate": "light", "interpolation": "hard"},
    {"group_size": 4, "ste": "dense"},
    {"group_size": 8, "gate": "light", "active": 1.0},
]


@pytest.fixture(autouse=True, params=["reference", "auto"])
def _kernels(request):
    midl.kernels(request.param)


@pytest.fixture
def selections():
    """Collect what every layer selects while the test runs."""
    seen = []

    def observe(layer, selected):
        seen.append(selected)

    observers.append(observe)
    yield seen
    observers.remove(observe)


@pytest.mark.parametrize("choices", CHOICES, ids=str)
@pytest.mark.parametrize("span", [1, 3])
def test_layer_equals_the_loop(selections, choices, span):
    layer = MIDLinear(12, 16, rank=3, span=span, dtype=torch.float64, **choices)
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    grad_y = torch.randn(2, 7, 16, dtype=torch.float64)
    y = layer(x)
    y.backward(grad_y)
    tensors = {
        "x": x.detach(),
        **dict.fromkeys(("weight", "bias", "light_down", "light_up", "gate_weight", "gate_bias")),
    }
    tensors.update({name: p.detach() for name, p in layer.named_parameters()})
    c = layer.config
    options = Options(layer.num_selected, c.group_size, c.interpolation, c.ste)
    loop = plain_linear(tensors, options, span, None, grad_y)
    grads = {name: p.grad for name, p in layer.named_parameters()}
    selected = selections[-1].view(loop["selected"].shape)
    assert_close_to_loop({"y": y.detach(), "selected": selected, "x": x.grad, **grads}, loop)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (7, 5), (2, 3, 4), (2, 0, 3), (1, 1, 1, 1, 2)])
@pytest.mark.parametrize("span", [1, 2])
def test_any_leading_shape(shape, span):
    layer = MIDLinear(16, 32, active=0.5, rank=4, span=span)
    x = torch.randn(*shape, 16, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape, 32)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad.shape == p.shape for p in layer.parameters())


def test_leading_dimensions_are_rows_each_on_its_own():
    layer = MIDLinear(16, 32, rank=4, dtype=torch.float64)
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    y = layer(x)
    torch.testing.assert_close(y.view(15, 32), layer(x.view(15, 16)), rtol=0, atol=0)
    torch.testing.assert_close(y[1, 2], layer(x[1, 2]), rtol=1e-12, atol=1e-12)


def layouts():
    x = torch.randn(4, 6, 16)
    return {
        "transposed": x.mT.contiguous().mT,
        "permuted": x.permute(1, 0, 2),
        "strided": torch.randn(4, 12, 32)[:, ::2, ::2],
        "offset": torch.randn(5, 6, 17)[1:, :, 1:],
        "expanded rows": torch.randn(1, 1, 16).expand(4, 6, 16),
        "expanded features": torch.randn(4, 6, 1).expand(4, 6, 16),
    }


@pytest.mark.parametrize("layout", list(layouts()))
@pytest.mark.parametrize("span", [1, 4])
def test_the_layout_of_the_input_changes_nothing(layout, span):
    layer = MIDLinear(16, 32, rank=4, group_size=4, span=span)
    x = layouts()[layout]
    results = []
    for value in (x, x.contiguous()):
        value = value.detach().requires_grad_()
        y = layer(value)
        results.append((y, *torch.autograd.grad(y.square().sum(), [value, *layer.parameters()])))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("choices", CHOICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_eval_is_train_without_noise_bit_for_bit(choices, dtype):
    layer = MIDLinear(16, 32, rank=4, dtype=dtype, **choices)
    noisy = MIDLinear(16, 32, rank=4, dtype=dtype, noise=3.0, **choices)
    noisy.load_state_dict(layer.state_dict())
    x = torch.randn(9, 16, dtype=dtype)
    expected = layer(x)
    assert expected.dtype == dtype
    assert torch.equal(layer.eval()(x), expected)
    assert torch.equal(noisy.eval()(x), expected)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)


def test_noise_changes_the_selection_in_training_alone_and_repeats_with_the_seed(selections):
    layer, x = MIDLinear(16, 32, rank=4, noise=2.0), torch.randn(20, 16)

    def selected(training, seed):
        torch.manual_seed(seed)
        layer.train(training)(x)
        return selections[-1]

    assert torch.equal(selected(True, 1), selected(True, 1))
    assert not torch.equal(selected(True, 1), selected(True, 2))
    assert not torch.equal(selected(True, 1), selected(False, 1))
    assert torch.equal(selected(False, 1), selected(False, 2))


def test_noise_moves_which_groups_are_mixed_and_not_how():
    # At active=1 noise has nothing to choose, so it must leave no trace.
    layer = MIDLinear(16, 32, rank=4, noise=5.0, active=1.0)
    x = torch.randn(9, 16)
    assert torch.equal(layer(x), layer.eval()(x))


def test_evaluation_draws_no_random_numbers():
    layer, x = MIDLinear(16, 32, rank=4, noise=2.0).eval(), torch.randn(3, 16)
    before = torch.get_rng_state()
    layer(x)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_a_row_with_nan_or_inf_harms_only_itself(selections, choices, value):
    layer, x = MIDLinear(16, 32, rank=4, **choices), torch.randn(9, 16)
    clean = layer(x)
    x[4, 3] = value
    x = x.requires_grad_()
    y = layer(x)
    others = [i for i in range(9) if i != 4]
    assert torch.equal(y[others], clean[others])
    assert not y[4].isfinite().all()
    assert selections[-1].shape == (9, layer.num_selected)
    assert all(len(set(row)) == layer.num_selected and max(row) < layer.num_groups for row in selections[-1].tolist())
    y[others].sum().backward()
    assert bool(x.grad[others].isfinite().all())


def test_a_nan_row_of_a_sequence_harms_only_its_own_block():
    layer, x = MIDLinear(16, 32, rank=4, span=3), torch.randn(2, 8, 16)
    clean = layer(x)
    x[1, 4, 0] = float("nan")  # Block 3..5 of the second sequence.
    y = layer(x)
    assert torch.equal(y[0], clean[0])
    assert torch.equal(y[1, :3], clean[1, :3])
    assert torch.equal(y[1, 6:], clean[1, 6:])


@pytest.mark.parametrize("logit", [0.0, 1e30, -1e30, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("active", [0.1, 0.5, 1.0])
def test_exactly_k_groups_per_row_whatever_the_logits(selections, logit, active):
    layer = MIDLinear(16, 32, rank=4, group_size=2, active=active)
    nn.init.constant_(layer.gate_bias, logit)
    nn.init.zeros_(layer.gate_weight)
    layer(torch.randn(5, 16))
    assert selections[-1].tolist() == [list(range(layer.num_selected))] * 5


def test_with_all_groups_active_and_hard_it_is_the_dense_layer():
    dense = nn.Linear(16, 32, dtype=torch.float64)
    layer = MIDLinear.from_linear(dense, active=1.0, interpolation="hard", rank=4)
    x = torch.randn(6, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-12, atol=1e-12)


def test_with_full_rank_every_choice_is_the_dense_layer():
    dense = nn.Linear(16, 32, dtype=torch.float64)
    layer = MIDLinear.from_linear(dense, active=0.3, rank=16)
    x = torch.randn(6, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-10, atol=1e-10)


def test_a_smaller_budget_selects_a_subset_at_any_time(selections):
    layer, x = MIDLinear(16, 32, rank=4), torch.randn(9, 16)
    chosen = []
    for active in (1.0, 0.9, 0.5, 0.1):
        layer.active = active
        layer(x)
        chosen.append([set(row) for row in selections[-1].tolist()])
        assert selections[-1].shape[-1] == round(active * 32)
    for wide, narrow in itertools.pairwise(chosen):
        assert all(b < a for a, b in zip(wide, narrow, strict=True))


def test_training_reduces_the_loss_of_a_regression():
    teacher = nn.Linear(16, 32)
    layer = MIDLinear(16, 32, rank=4, group_size=4, active=0.5)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    x = torch.randn(256, 16)
    with torch.no_grad():
        target = teacher(x)
    losses = []
    for _ in range(150):
        loss = nn.functional.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
