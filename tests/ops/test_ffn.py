"""midl::ffn: the reference against a loop and gradcheck, the dense implementation against it, and torch's opcheck."""

from __future__ import annotations

import itertools

import pytest
import torch
from ffn_loop import TENSORS, plain_ffn, random_ffn
from helpers import error_ratio, with_gradients
from hypothesis import given
from hypothesis import strategies as st

import midl
from midl.errors import KernelError, MIDLError
from midl.ops.ffn import ffn
from midl.ops.reference_ffn import ACTIVATIONS

ops = torch.ops.midl


@pytest.fixture(autouse=True)
def _reference():
    midl.kernels("reference")


def check_loop(rows, d, hidden, out, k, group_size, activation="gelu", interpolation="sigmoid", **choices):
    noise = choices.pop("noise", None)
    tensors = random_ffn((rows, d), hidden, out, 2, group_size, **choices)
    y, selected = ffn(*tensors.values(), noise, k, group_size, activation, interpolation, "selected")
    loop = plain_ffn(tensors, k, group_size, activation, interpolation, noise)
    assert torch.equal(selected, loop["selected"])
    torch.testing.assert_close(y, loop["y"], rtol=1e-12, atol=1e-12)
    return selected


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("interpolation", ["sigmoid", "hard"])
@pytest.mark.parametrize("gated", [False, True])
def test_the_reference_equals_the_loop_for_every_rule(poisoned_memory, activation, interpolation, gated):
    check_loop(3, 5, 12, 4, 2, 3, activation, interpolation, gated=gated)


@given(
    rows=st.integers(1, 4), d=st.integers(2, 6), groups=st.integers(1, 5), group_size=st.integers(1, 3),
    out=st.integers(2, 5), bias=st.booleans(), gated=st.booleans(), data=st.data(),
)  # fmt: skip
def test_the_reference_equals_the_loop_for_every_size(rows, d, groups, group_size, out, bias, gated, data):
    k = data.draw(st.integers(1, groups))
    check_loop(rows, d, groups * group_size, out, k, group_size, bias=bias, gated=gated)


def test_noise_moves_the_selection_and_enters_nothing_else():
    noise = torch.randn(6, 8, dtype=torch.float64) * 10
    noisy = check_loop(6, 5, 16, 4, 3, 2, noise=noise)
    torch.manual_seed(0)
    torch.randn(6, 8, dtype=torch.float64)  # the same parameters as above
    assert not torch.equal(noisy, check_loop(6, 5, 16, 4, 3, 2))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_sigmoid_with_ste_selected_is_the_exact_gradient(activation, gated):
    tensors = random_ffn((3, 4), 6, 3, 2, 2, gated=gated, requires_grad=True)
    present = [name for name, t in tensors.items() if t is not None]

    def output(*values):
        given = {**tensors, **dict(zip(present, values, strict=True))}
        return ffn(*given.values(), None, 2, 2, activation, "sigmoid", "selected")[0]

    assert torch.autograd.gradcheck(output, [tensors[name] for name in present], eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("interpolation", ["sigmoid", "hard"])
@pytest.mark.parametrize("ste", ["selected", "dense"])
@pytest.mark.parametrize("gated", [False, True])
def test_every_gradient_equals_that_of_the_formula_written_with_autograd(interpolation, ste, gated):
    k, size, groups = 2, 3, 4
    tensors = random_ffn((5, 4), 12, 6, 2, size, gated=gated)
    grad_y = torch.randn(5, 6, dtype=torch.float64)
    ours = with_gradients(ffn, tensors, None, k, size, "silu", interpolation, ste, grad_y=grad_y)

    def formula(*values):
        t = dict(zip(TENSORS, values, strict=True))
        code = t["x"] @ t["light_down"].T
        gate = (code @ t["gate_weight"].T + t["gate_bias"]).sigmoid()
        mask = torch.zeros_like(gate).scatter(-1, ours["selected"].long(), 1.0)
        hidden = torch.nn.functional.silu(t["x"] @ t["weight"].T + t["bias"])
        if gated:
            hidden = hidden * (t["x"] @ t["value_weight"].T + t["value_bias"])
        light = code @ t["light_up"].T
        parts = torch.einsum("bgj,ogj->bgo", (hidden - t["light_hidden"]).unflatten(-1, (groups, size)),
                             t["down_weight"].unflatten(-1, (groups, size))) - light[:, None] / groups  # fmt: skip
        # What flows through the gate: of the selected groups or of all, whatever its weight in the output.
        through = (gate - gate.detach()) * (mask if ste == "selected" else 1)
        share = mask * (gate.detach() if interpolation == "sigmoid" else 1)
        y = light + t["light_bias"] + t["down_bias"]
        y = y + (share[..., None] * parts).sum(1) + (through[..., None] * parts.detach()).sum(1)
        return y, ours["selected"]

    theirs = with_gradients(formula, tensors, grad_y=grad_y)
    for name in ("y", *(name for name in TENSORS if tensors[name] is not None)):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("activation", "gated", "group_size", "bias"),
    [("gelu", False, 1, True), ("silu", True, 4, False), ("gelu_tanh", False, 4, True), ("relu", True, 1, True)],
)
def test_dense_equals_the_reference(poisoned_memory, activation, gated, group_size, bias):
    tensors = random_ffn((7, 12), 32, 10, 3, group_size, gated=gated, bias=bias, dtype=torch.float32)
    rest = (None, 3, group_size, activation, "sigmoid", "selected")
    grad_y = torch.randn(7, 10)
    expected = with_gradients(ffn, tensors, *rest, grad_y=grad_y)
    with midl.kernels("dense"):
        actual = with_gradients(ffn, tensors, *rest, grad_y=grad_y)
    assert torch.equal(actual["selected"], expected["selected"])
    for name, value in expected.items():
        assert error_ratio(actual[name], value) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype):
    tensors = random_ffn((5, 16), 32, 16, 4, 4, gated=True, dtype=dtype)
    rest = (None, 3, 4, "silu", "sigmoid", "selected")
    y, selected = ffn(*tensors.values(), *rest)
    y32, selected32 = ffn(*(t.float() for t in tensors.values()), *rest)
    assert torch.equal(y, y32.to(dtype))
    assert torch.equal(selected, selected32)


def calls(gated, dtype=torch.float32, shape=(7, 5), transposed=False):
    tensors = random_ffn(shape, 12, 4, 3, 2, gated=gated, bias=not gated, dtype=dtype)
    if transposed:
        tensors["x"] = tensors["x"].mT.contiguous().mT
        tensors["down_weight"] = tensors["down_weight"].mT.contiguous().mT
    forward = (*tensors.values(), None, 2, 2, "gelu", "sigmoid", "selected")
    y, selected = ffn(*forward)
    needs = [t is not None for t in tensors.values()]
    return forward, (torch.randn_like(y), selected, *tensors.values(), 2, "gelu", "sigmoid", "dense", needs)


@pytest.mark.parametrize(
    ("kernels", "gated", "dtype", "shape", "transposed"),
    [
        ("reference", False, torch.float32, (7, 5), True),
        pytest.param("reference", True, torch.bfloat16, (2, 3, 5), False, marks=pytest.mark.slow),
        pytest.param("dense", False, torch.float32, (2, 3, 5), False, marks=pytest.mark.slow),
        ("dense", True, torch.float32, (7, 5), True),
    ],
)
def test_opcheck(kernels, gated, dtype, shape, transposed):
    midl.kernels(kernels)
    forward, backward = calls(gated, dtype, shape, transposed)
    leaves = tuple(t if t is None else t.detach().requires_grad_() for t in forward[:13])
    torch.library.opcheck(ops.ffn.default, (*leaves, *forward[13:]))
    torch.library.opcheck(ops.ffn_backward.default, backward)


def test_gradients_not_needed_are_empty():
    _, backward = calls(False)
    needs = [i in (0, 5, 9) for i in range(13)]
    grads = ops.ffn_backward(*backward[:-1], needs)
    assert [g.numel() > 0 for g in grads] == needs
    torch.library.opcheck(ops.ffn_backward.default, (*backward[:-1], needs))


def test_second_derivatives_are_refused():
    forward, _ = calls(False)
    x = forward[0].requires_grad_()
    (grad,) = torch.autograd.grad(ffn(x, *forward[1:])[0].square().sum(), x, create_graph=True)
    with pytest.raises(KernelError, match="second derivatives"):
        grad.sum().backward()


def test_an_unknown_activation():
    forward, _ = calls(False)
    with pytest.raises(MIDLError, match="activation='tanh', expected one of"):
        ffn(*forward[:16], "tanh", *forward[17:])


def test_every_combination_of_rules_runs_on_an_empty_batch():
    for interpolation, ste in itertools.product(("sigmoid", "hard"), ("selected", "dense")):
        tensors = random_ffn((0, 5), 12, 4, 2, 2)
        grad_y = torch.zeros(0, 4, dtype=torch.float64)
        out = with_gradients(ffn, tensors, None, 2, 2, "gelu", interpolation, ste, grad_y=grad_y)
        assert out["y"].shape == (0, 4)
        assert out["selected"].shape == (0, 2)
        assert not any(out[name].any() for name in TENSORS if tensors[name] is not None)
