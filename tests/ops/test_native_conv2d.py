"""The native convolution against the reference in float64: outputs, selection, windows, memory layouts, threads."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from helpers import error_ratio, instruction_sets_to_test
from helpers import random_tensors as draw_tensors
from hypothesis import given
from hypothesis import strategies as st

import midl
from midl.ops import reference
from midl.ops.conv2d import conv2d
from midl.ops.dispatch import unavailable_reason

if unavailable_reason("native"):
    pytest.skip(f"native kernels: {unavailable_reason('native')}", allow_module_level=True)

from midl.ops import native, native_packing

pytestmark = pytest.mark.usefixtures("native_kernels")
SETS = instruction_sets_to_test()
# Root-mean-square error in units of the result's root-mean-square.
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 3e-3}

random_tensors = functools.partial(draw_tensors, dtype=torch.float32)


def options(k, group_size, *, stride=1, padding=1, dilation=1, span=1, rule="sigmoid", noise=None):
    window = [[v, v] if isinstance(v, int) else list(v) for v in (stride, padding, dilation)]
    return (noise, *window, k, group_size, span, rule, "selected")


def expected(tensors, noise, *rest):
    """The reference in float64 on the same values, output not rounded."""
    doubles = [None if t is None else t.detach().double() for t in tensors.values()]
    return reference.conv2d(*doubles, None if noise is None else noise.double(), *rest)


def check(tensors, k, group_size, **choices):
    """Compare a call that packs for itself and one with panels that are kept."""
    rest = options(k, group_size, **choices)
    y, selected = expected(tensors, *rest)
    dtype = tensors["x"].dtype
    for _ in range(2):
        actual, chosen = conv2d(*tensors.values(), *rest)
        assert actual.dtype == dtype
        assert actual.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(chosen, selected)
        assert error_ratio(actual, y) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("gate", ["projection", "light"])
@pytest.mark.parametrize("rule", ["sigmoid", "hard"])
@pytest.mark.parametrize("group_size", [1, 3, 5, 8, 16, 32, 48])
def test_output_and_selection_equal_the_reference(instruction_set, dtype, gate, rule, group_size):
    shape = (group_size * 6, 12, 3, 3)
    check(random_tensors((2, 12, 5, 7), shape, 7, group_size, gate=gate, dtype=dtype), 3, group_size, rule=rule)


WINDOWS = [
    ((1, 1), {"padding": 0}),
    ((1, 1), {"padding": 0, "stride": 2}),
    ((1, 1), {"padding": 1}),
    ((3, 3), {"padding": 0}),
    ((3, 3), {"stride": 2}),
    ((3, 3), {"dilation": 2, "padding": 2}),
    ((3, 3), {"dilation": 3, "padding": 0, "stride": 3}),
    ((5, 5), {"padding": 4}),
    ((2, 4), {"padding": (0, 1), "stride": (2, 1), "dilation": (1, 2)}),
    ((1, 7), {"padding": (0, 3)}),
    ((7, 1), {"padding": (3, 0), "stride": (4, 5)}),
]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("channels", [1, 3, 33, 34])
@pytest.mark.parametrize(("kernel", "window"), WINDOWS)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_any_window(instruction_set, dtype, channels, kernel, window, format):
    tensors = random_tensors((2, channels, 9, 11), (32, channels, *kernel), 4, 16, dtype=dtype)
    tensors["x"] = tensors["x"].contiguous(memory_format=format)
    check(tensors, 1, 16, **window)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("channels", [1, 3, 17, 63, 100, 400])
@pytest.mark.parametrize("size", [(1, 1), (3, 17), (8, 8)])
def test_channels_and_maps_that_fill_no_tile(instruction_set, dtype, channels, size):
    for group_size, groups in ((1, 17), (3, 5), (32, 3)):
        shape = (group_size * groups, channels, 3, 3)
        check(random_tensors((2, channels, *size), shape, 4, group_size, dtype=dtype), 2, group_size)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("gate", ["projection", "light"])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("group_size", "span"), [(1, 1), (5, 2), (32, 0)])
def test_a_full_path_computed_by_torch(instruction_set, dtype, gate, format, group_size, span):
    tensors = random_tensors((2, 20, 9, 11), (group_size * 6, 20, 3, 3), 5, group_size, gate=gate, dtype=dtype)
    tensors["x"] = tensors["x"].contiguous(memory_format=format)
    with midl.kernels("dense"):
        check(tensors, 2, group_size, span=span, stride=2)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("gate", ["projection", "light"])
@pytest.mark.parametrize("span", [2, 3, 9, 0])
@pytest.mark.parametrize("size", [(4, 9), (30, 31)])
def test_neighbours_and_images_that_share_a_selection(instruction_set, dtype, gate, span, size):
    check(random_tensors((2, 6, *size), (48, 6, 3, 3), 4, 8, gate=gate, dtype=dtype), 2, 8, span=span)


def test_maps_of_several_chunks(instruction_set):
    check(random_tensors((3, 8, 23, 40), (64, 8, 3, 3), 5, 16), 2, 16)
    check(random_tensors((40, 40, 5, 6), (64, 40, 3, 3), 5, 16), 2, 16, stride=2)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize(("batch", "size"), [(1, 4), (3, 7), (5, 20)])
def test_any_number_of_threads_gives_the_same_bits(threads, batch, size):
    tensors, rest = random_tensors((batch, 40, size, size), (128, 40, 3, 3), 12, 16), options(4, 16)
    torch.set_num_threads(1)
    alone, _ = conv2d(*tensors.values(), *rest)
    torch.set_num_threads(threads)
    for _ in range(2):
        assert torch.equal(alone, conv2d(*tensors.values(), *rest)[0])
    check(tensors, 4, 16)


def test_an_image_gives_the_same_bits_in_any_batch():
    tensors, rest = random_tensors((9, 20, 12, 12), (64, 20, 3, 3), 8, 16), options(2, 16)
    whole, _ = conv2d(*tensors.values(), *rest)
    for images in (slice(0, 1), slice(3, 7), slice(2, 9)):
        part, _ = conv2d(tensors["x"][images], *list(tensors.values())[1:], *rest)
        assert torch.equal(part, whole[images])


def test_eight_python_threads_at_once():
    torch.set_num_threads(2)
    cases = [random_tensors((2, 16, size, size), (64, 16, 3, 3), 6, 16) for size in (1, 4, 9, 20)]
    rest = options(2, 16)
    results = [expected(case, *rest) for case in cases]
    errors: list[str] = []

    def work(seed: int) -> None:
        for i in range(12):
            case, (y, selected) = cases[(i + seed) % 4], results[(i + seed) % 4]
            actual, chosen = conv2d(*case.values(), *rest)
            if not torch.equal(chosen, selected) or error_ratio(actual, y) > LIMITS[torch.float32]:
                errors.append(f"thread {seed}, call {i}")

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors


def test_inputs_that_are_not_contiguous(instruction_set):
    tensors = random_tensors((4, 20, 9, 9), (64, 20, 3, 3), 6, 16)
    wide, odd = torch.randn(4, 21, 20, 19), torch.randn(4 * 20 * 81 + 1)
    inputs = {
        "strided pixels": wide[:, :20, ::2, ::2][..., :9, :9],
        "part of channels-last": wide.contiguous(memory_format=torch.channels_last)[:, 1:, :9, 2:11],
        "transposed": wide[:, :20, :9, :9].transpose(2, 3),
        "unaligned": odd[1:].view(4, 20, 9, 9),
        "expanded images": wide[:1, :20, :9, :9].expand(4, 20, 9, 9),
        "expanded channels": wide[:, :1, :9, :9].expand(4, 20, 9, 9),
    }
    for x in inputs.values():
        for padding in (0, 1):
            check({**tensors, "x": x}, 2, 16, padding=padding)
    strided = {name: None if t is None else t.repeat_interleave(2, -1)[..., ::2] for name, t in tensors.items()}
    check(strided, 2, 16)
    check({**tensors, "weight": tensors["weight"].contiguous(memory_format=torch.channels_last)}, 2, 16)


def test_empty_batches(instruction_set):
    y, selected = conv2d(*random_tensors((0, 5, 4, 6), (12, 5, 3, 3), 2, 4).values(), *options(2, 4))
    assert y.shape == (0, 12, 4, 6)
    assert selected.shape == (0, 4, 6, 2)


def test_no_bias(instruction_set):
    for gate in ("projection", "light"):
        check(random_tensors((2, 9, 5, 5), (64, 9, 3, 3), 5, 16, bias=False, gate=gate), 2, 16)


def test_noise_moves_the_selection_alone(instruction_set):
    tensors = random_tensors((2, 9, 5, 6), (64, 9, 3, 3), 5, 16)
    check(tensors, 2, 16, noise=torch.randn(2, 5, 6, 4) * 10)
    check(tensors, 2, 16, noise=torch.randn(2, 5, 2, 4) * 10, span=4)
    check(tensors, 2, 16, noise=torch.randn(2, 1, 4) * 10, span=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_pixel_harms_its_neighbourhood_alone(instruction_set, bad):
    tensors, rest = random_tensors((2, 9, 8, 8), (64, 9, 3, 3), 5, 16), options(2, 16)
    good, _ = conv2d(*tensors.values(), *rest)
    tensors["x"][1, 2, 4, 5] = bad
    y, selected = conv2d(*tensors.values(), *rest)
    near = torch.zeros(2, 64, 8, 8, dtype=torch.bool)
    near[1, :, 3:6, 4:7] = True
    assert not y[near].isfinite().any()
    assert torch.equal(y[~near], good[~near])
    assert ((selected >= 0) & (selected < 4)).all()


@pytest.mark.parametrize("parameter", ["weight", "light_down", "light_up", "gate_weight"])
def test_changed_parameters_are_never_served_from_old_panels(parameter):
    layer = midl.MIDConv2d(8, 64, 3, active=0.5, group_size=16)
    x = torch.randn(2, 8, 9, 9)
    for _ in range(3):
        layer(x)
    assert native_packing.packed_bytes() > 0
    with torch.no_grad():
        getattr(layer, parameter).mul_(1.5)
    for _ in range(3):
        with midl.kernels("reference"):
            y = layer(x)
        assert error_ratio(layer(x), y) < LIMITS[torch.float32]


def test_training_steps_keep_no_panels():
    layer = midl.MIDConv2d(8, 64, 3, active=0.5, group_size=16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    midl.kernels("auto")
    for _ in range(4):
        layer(torch.randn(2, 8, 9, 9)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert native_packing.packed_bytes() == 0


def test_train_and_eval_give_the_same_bits():
    layer = midl.MIDConv2d(10, 96, 3, active=0.4, group_size=8)
    x = torch.randn(3, 10, 11, 12)
    assert torch.equal(layer.train()(x), layer.eval()(x))


@given(
    batch=st.integers(1, 3), channels=st.integers(1, 40), height=st.integers(1, 12), width=st.integers(1, 20),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)), stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)), dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.integers(1, 12), group_size=st.integers(1, 40), share=st.floats(0, 1), span=st.integers(0, 4),
    gate=st.sampled_from(["projection", "light"]), rule=st.sampled_from(["sigmoid", "hard"]), bias=st.booleans(),
    name=st.sampled_from(SETS), dtype=st.sampled_from(list(LIMITS)), format=st.sampled_from(["nchw", "nhwc"]),
)  # fmt: skip
def test_any_layer_equals_the_reference(
    batch, channels, height, width, kernel, stride, padding, dilation, groups, group_size, share, span, gate, rule,
    bias, name, dtype, format,
):  # fmt: skip
    size = [
        max(s, d * (k - 1) + 1 - 2 * p) for s, k, p, d in zip((height, width), kernel, padding, dilation, strict=True)
    ]
    native.use_instruction_set(name)
    tensors = random_tensors(
        (batch, channels, *size), (groups * group_size, channels, *kernel), 3, group_size, gate=gate, bias=bias,
        dtype=dtype,
    )  # fmt: skip
    if format == "nhwc":
        tensors["x"] = tensors["x"].contiguous(memory_format=torch.channels_last)
    check(
        tensors, max(1, round(share * groups)), group_size, stride=stride, padding=padding, dilation=dilation,
        span=span, rule=rule,
    )  # fmt: skip
