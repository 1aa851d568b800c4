"""The switch between implementations, and that the dense one is the reference's equal."""

from __future__ import annotations

import pytest
import torch
from helpers import error_ratio, random_tensors, with_gradients

import midl
from midl.errors import KernelError, MIDLError
from midl.ops import dispatch
from midl.ops.conv2d import conv2d
from midl.ops.linear import linear

# Root-mean-square error against the reference, in units of the output's.
LIMITS = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture
def absent(monkeypatch):
    """Register ``native`` as an implementation that this machine cannot run."""
    broken = dispatch.Implementation("native", {}, unavailable=lambda: "no such processor")
    monkeypatch.setitem(dispatch._registry, "native", broken)


@pytest.fixture
def picky(monkeypatch):
    """Register ``native`` as an implementation that takes linear layers of float32 alone, and counts its calls."""
    calls = []

    def count(*args):
        calls.append(args)
        return dispatch._implementation("reference").ops["linear"](*args)

    def unsupported(op, x, **_):
        return None if x.dtype == torch.float32 else f"dtype={x.dtype}, expected torch.float32"

    only_linear = dispatch.Implementation("native", {"linear": count}, unsupported=unsupported)
    monkeypatch.setitem(dispatch._registry, "native", only_linear)
    return calls


def arguments(dtype=torch.float32):
    tensors = random_tensors((3, 5), (8, 5), 2, dtype=dtype)
    return (*tensors.values(), None, 2, 1, 1, "sigmoid", "selected")


def test_kernels_sets_the_choice_for_the_process():
    midl.kernels("reference")
    assert dispatch.selected_kernels() == "reference"
    midl.kernels("dense")
    assert dispatch.selected_kernels() == "dense"


def test_kernels_nests_as_a_context_manager():
    midl.kernels("auto")
    with midl.kernels("reference"):
        with midl.kernels("dense"):
            assert dispatch.selected_kernels() == "dense"
        assert dispatch.selected_kernels() == "reference"
    assert dispatch.selected_kernels() == "auto"


def test_kernels_restores_the_choice_after_an_exception():
    midl.kernels("auto")
    with pytest.raises(ZeroDivisionError), midl.kernels("reference"):
        raise ZeroDivisionError
    assert dispatch.selected_kernels() == "auto"


def test_kernels_may_be_entered_again_and_inside_itself():
    midl.kernels("auto")
    choice = midl.kernels("reference")
    midl.kernels("dense")
    for _ in range(2):
        with choice:
            assert dispatch.selected_kernels() == "reference"
            with midl.kernels("dense"), choice:
                assert dispatch.selected_kernels() == "reference"
            assert dispatch.selected_kernels() == "reference"
        assert dispatch.selected_kernels() == "auto"


def test_a_package_that_registers_nothing_says_so(monkeypatch):
    monkeypatch.delitem(dispatch._registry, "native", raising=False)
    monkeypatch.setattr(dispatch.importlib, "import_module", lambda _: None)
    with pytest.raises(KernelError, match=r"midl\.ops\.native was imported but registered no implementation"):
        dispatch.unavailable_reason("native")


def test_an_unknown_name_is_refused_and_changes_nothing():
    midl.kernels("reference")
    with pytest.raises(MIDLError, match=r"kernels: name='cublas', expected one of \('auto', 'reference', 'native'"):
        midl.kernels("cublas")
    assert dispatch.selected_kernels() == "reference"


def test_an_unavailable_implementation_is_refused_with_what_is_available(absent):
    midl.kernels("reference")
    with pytest.raises(
        KernelError, match=r"name='native'.*no such processor.*available here: \['reference'.*'dense'\]"
    ):
        midl.kernels("native")
    assert dispatch.selected_kernels() == "reference"
    assert issubclass(KernelError, MIDLError)


def test_auto_passes_over_what_is_unavailable(absent):
    midl.kernels("auto")
    y, _ = linear(*arguments())
    assert y.shape == (3, 8)


def test_auto_takes_the_first_that_supports_the_call(picky):
    midl.kernels("auto")
    linear(*arguments(torch.float32))
    assert len(picky) == 1
    linear(*arguments(torch.float64))
    assert len(picky) == 1


def test_a_forced_implementation_says_why_it_cannot_take_a_call(picky):
    midl.kernels("native")
    with pytest.raises(KernelError, match=r"midl::linear: kernels='native'.*torch\.float64, expected torch\.float32"):
        linear(*arguments(torch.float64))


def test_a_forced_implementation_says_which_op_it_lacks(picky):
    midl.kernels("native")
    with pytest.raises(KernelError, match=r"midl::conv2d: kernels='native'.*does not implement midl::conv2d"):
        midl.MIDConv2d(4, 8, 3, rank=2)(torch.randn(1, 4, 5, 5))


def test_the_choice_at_the_time_of_the_call_counts_in_the_backward_pass_too(picky):
    midl.kernels("native")
    x, *rest = arguments()
    y, _ = linear(x.requires_grad_(), *rest)
    with pytest.raises(KernelError, match="midl::linear_backward"):
        y.sum().backward()
    with midl.kernels("reference"):
        y.sum().backward()


def compare(op, tensors, *rest):
    with midl.kernels("reference"):
        with torch.no_grad():
            shape = op(*tensors.values(), *rest)[0].shape
        grad_y = torch.randn(shape).to(tensors["x"].dtype)
        expected = with_gradients(op, tensors, *rest, grad_y=grad_y)
    with midl.kernels("dense"):
        actual = with_gradients(op, tensors, *rest, grad_y=grad_y)
    assert torch.equal(actual["selected"], expected["selected"])
    limit = LIMITS[tensors["x"].dtype]
    for name, value in expected.items():
        if name != "selected":
            assert actual[name].dtype == value.dtype
            assert error_ratio(actual[name], value) <= limit, name


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("gate", ["projection", "light"])
@pytest.mark.parametrize(("shape", "span"), [((63, 100), 1), ((2, 7, 100), 3)])
@pytest.mark.parametrize("interpolation", ["sigmoid", "hard"])
def test_dense_linear_is_the_reference(poisoned_memory, dtype, gate, shape, span, interpolation):
    tensors = random_tensors(shape, (600, 100), 9, 4, gate=gate, dtype=dtype)
    compare(linear, tensors, None, 60, 4, span, interpolation, "dense")


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("gate", ["projection", "light"])
@pytest.mark.parametrize("span", [1, 2, 0], ids=["position", "span 2", "image"])
def test_dense_conv2d_is_the_reference(poisoned_memory, dtype, gate, span):
    tensors = random_tensors((2, 5, 7, 9), (24, 5, 3, 3), 6, 4, gate=gate, dtype=dtype)
    compare(conv2d, tensors, None, (2, 1), (1, 1), (1, 2), 3, 4, span, "sigmoid", "selected")


def test_dense_refuses_float16_on_the_cpu_and_auto_computes_it():
    args = arguments(torch.float16)
    with midl.kernels("dense"), pytest.raises(KernelError, match="float16"):
        linear(*args)
    with midl.kernels("auto"):
        assert linear(*args)[0].dtype == torch.float16


@pytest.mark.parametrize("op", ["linear", "conv2d"])
@pytest.mark.parametrize("name", ["reference", "dense"])
def test_autocast_does_not_reach_into_an_implementation(op, name):
    midl.kernels(name)
    if op == "linear":
        tensors, rest = random_tensors((7, 16), (32, 16), 4, dtype=torch.float32), ()
        run = linear
    else:
        tensors, rest = random_tensors((2, 4, 5, 5), (8, 4, 3, 3), 4, dtype=torch.float32), ((1, 1),) * 3
        run = conv2d
    args = (*tensors.values(), None, *rest, 3, 1, 1, "sigmoid", "selected")
    y, selected = run(*args)
    with torch.autocast("cpu", torch.bfloat16):
        y_autocast, selected_autocast = run(*args)
    assert torch.equal(y, y_autocast)
    assert torch.equal(selected, selected_autocast)
