"""The native CPU kernels against the reference: outputs, selection, caching, threads, every instruction set."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from changes import (
    change_by_copy,
    change_data,
    change_in_inference_mode,
    change_one_value,
    change_through_data,
)
from helpers import error_ratio, instruction_sets_to_test
from helpers import random_tensors as draw_tensors
from hypothesis import given
from hypothesis import strategies as st

import midl
from midl.errors import KernelError, MIDLError
from midl.ops import reference
from midl.ops.dispatch import unavailable_reason
from midl.ops.linear import linear
from midl.selection import topk_groups

if unavailable_reason("native"):
    pytest.skip(f"native kernels: {unavailable_reason('native')}", allow_module_level=True)

from midl.ops import native, native_packing

pytestmark = pytest.mark.usefixtures("native_kernels")
SETS = instruction_sets_to_test()
# Root-mean-square error in units of the result's root-mean-square.
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 3e-3}


random_tensors = functools.partial(draw_tensors, dtype=torch.float32)


def call(tensors: dict[str, Any], k: int, group_size: int, *, span: int = 1, noise: Any = None, rule: str = "sigmoid"):
    return linear(*tensors.values(), noise, k, group_size, span, rule, "selected")


def expected(
    tensors: dict[str, Any], k: int, group_size: int, *, span: int = 1, noise: Any = None, rule: str = "sigmoid"
):
    """The reference in float64 on the same values, output not rounded."""
    doubles = {name: None if t is None else t.detach().double() for name, t in tensors.items()}
    noise = None if noise is None else noise.double()
    return reference.linear(*doubles.values(), noise, k, group_size, span, rule, "selected")


def check(tensors: dict[str, Any], k: int, group_size: int, **options: Any) -> None:
    """Compare one call without panels and one with (the second call with the same weights packs them)."""
    y, selected = expected(tensors, k, group_size, **options)
    dtype = tensors["x"].dtype
    for _ in range(2):
        actual, chosen = call(tensors, k, group_size, **options)
        assert actual.dtype == dtype
        assert torch.equal(chosen, selected)
        assert error_ratio(actual, y) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("gate", ["projection", "light"])
@pytest.mark.parametrize("rule", ["sigmoid", "hard"])
@pytest.mark.parametrize("group_size", [1, 2, 3, 5, 8, 16, 32, 48])
def test_output_and_selection_equal_the_reference(instruction_set, dtype, gate, rule, group_size):
    tensors = random_tensors((13, 40), (group_size * 6, 40), 7, group_size, gate=gate, dtype=dtype)
    check(tensors, 3, group_size, rule=rule)


@pytest.mark.parametrize("rows", [1, 3, 8, 17, 63])
@pytest.mark.parametrize("depth", [1, 3, 17, 63, 100, 1000])
def test_rows_and_depths_that_fill_no_tile(instruction_set, rows, depth):
    for group_size, groups in ((1, 17), (3, 5), (32, 3)):
        check(random_tensors((rows, depth), (group_size * groups, depth), min(depth, 5), group_size), 2, group_size)


@pytest.mark.parametrize(("n", "group_size"), [(1, 1), (3, 3), (17, 1), (63, 9), (100, 20), (600, 100), (1000, 1000)])
def test_widths_that_fill_no_panel(instruction_set, n, group_size):
    groups = n // group_size
    tensors = random_tensors((9, 33), (n, 33), 6, group_size)
    for k in {1, max(1, groups // 2), groups}:
        check(tensors, k, group_size)


@pytest.mark.parametrize("rank", [1, 8, 31, 33, 100])
def test_ranks_that_fill_no_panel(instruction_set, rank):
    check(random_tensors((11, 120), (96, 120), rank, 8), 5, 8)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("gate", ["projection", "light"])
@pytest.mark.parametrize(("shape", "span"), [((2, 7, 20), 3), ((3, 5, 20), 5), ((2, 4, 20), 9), ((700, 20), 64)])
def test_neighbours_that_share_a_selection(instruction_set, dtype, gate, shape, span):
    check(random_tensors(shape, (48, 20), 4, 8, gate=gate, dtype=dtype), 2, 8, span=span)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("rows", [5, 17, 32, 150, 530])
@pytest.mark.parametrize(("group_size", "k"), [(1, 1), (1, 12), (1, 29), (2, 15), (4, 3), (4, 7)])
def test_many_rows_pick_among_narrow_groups(instruction_set, dtype, rows, group_size, k):
    for depth in (1, 193, 416):
        tensors = random_tensors((rows, depth), (68, depth), min(depth, 5), group_size, dtype=dtype)
        # What nobody selects must not matter.
        _, selected = expected(tensors, k, group_size)
        idle = set(range(68 // group_size)) - set(selected.unique().tolist())
        for group in idle:
            tensors["weight"][group * group_size : (group + 1) * group_size] = torch.nan
        y, _ = expected({**tensors, "weight": tensors["weight"].nan_to_num()}, k, group_size)
        actual, chosen = call(tensors, k, group_size)
        assert torch.equal(chosen, selected)
        assert error_ratio(actual, y) < LIMITS[dtype]


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 5, 40, 1300])
@pytest.mark.parametrize(("group_size", "k"), [(16, 14), (1, 230)])
def test_any_number_of_threads_gives_the_same_bits(threads, rows, group_size, k):
    tensors = random_tensors((rows, 256), (512, 256), 24, group_size)
    torch.set_num_threads(1)
    alone, _ = call(tensors, k, group_size)
    torch.set_num_threads(threads)
    for _ in range(2):
        native_packing.clear_packed()
        together, _ = call(tensors, k, group_size)
        assert torch.equal(alone, together)
    check(tensors, k, group_size)


def test_a_row_gives_the_same_bits_in_any_batch_of_a_packed_layer():
    tensors = random_tensors((40, 64), (128, 64), 8, 16)
    call(tensors, 4, 16)
    whole, _ = call(tensors, 4, 16)
    for rows in (slice(0, 1), slice(3, 10), slice(7, 39)):
        part, _ = call({**tensors, "x": tensors["x"][rows]}, 4, 16)
        assert torch.equal(part, whole[rows])


def test_eight_python_threads_at_once():
    torch.set_num_threads(2)
    cases = [random_tensors((rows, 96), (192, 96), 9, 16) for rows in (1, 4, 70, 300)]
    results = [expected(case, 5, 16) for case in cases]
    errors: list[str] = []

    def work(seed: int) -> None:
        for i in range(12):
            case, (y, selected) = cases[(i + seed) % 4], results[(i + seed) % 4]
            actual, chosen = call(case, 5, 16)
            if not torch.equal(chosen, selected) or error_ratio(actual, y) > LIMITS[torch.float32]:
                errors.append(f"thread {seed}, call {i}")

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert errors == []


@pytest.mark.parametrize("dtype", LIMITS)
def test_inputs_that_are_not_contiguous_or_not_aligned(instruction_set, dtype):
    tensors = random_tensors((12, 50), (64, 50), 6, 16, dtype=dtype)
    wide = torch.randn(12, 101).to(dtype)
    odd = torch.randn(12 * 50 + 1).to(dtype)
    inputs = {
        "transposed": wide[:, :50].T.contiguous().T,
        "strided rows": wide[:, 1:51],
        "strided columns": wide[:, ::2][:, :50],
        "unaligned": odd[1:].view(12, 50),
        "expanded rows": wide[:1, :50].expand(12, 50),
        "three axes": wide[:, :50].reshape(3, 4, 50).transpose(0, 1),
    }
    for x in inputs.values():
        check({**tensors, "x": x}, 2, 16)
    strided = {name: None if t is None else t.repeat_interleave(2, -1)[..., ::2] for name, t in tensors.items()}
    check(strided, 2, 16)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (0, 3, 5)])
def test_empty_batches(instruction_set, shape):
    y, selected = call(random_tensors(shape, (12, 5), 2, 4), 2, 4)
    assert y.shape == (*shape[:-1], 12)
    assert selected.shape == (*shape[:-1], 2)


def test_no_bias(instruction_set):
    check(random_tensors((7, 30), (64, 30), 5, 16, bias=False, gate="light"), 2, 16)
    check(random_tensors((7, 30), (64, 30), 5, 16, bias=False), 2, 16)


def test_noise_moves_the_selection_alone(instruction_set):
    tensors = random_tensors((6, 30), (64, 30), 5, 16)
    check(tensors, 2, 16, noise=torch.randn(6, 4) * 10)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_row_harms_itself_alone(instruction_set, bad):
    tensors = random_tensors((9, 30), (64, 30), 5, 16)
    good, _ = call(tensors, 2, 16)
    tensors["x"][4, 3] = bad
    y, selected = call(tensors, 2, 16)
    assert not y[4].isfinite().any()
    rest = [r for r in range(9) if r != 4]
    assert torch.equal(y[rest], good[rest])
    assert ((selected >= 0) & (selected < 4)).all()


def test_ties_go_to_the_lowest_groups(instruction_set):
    tensors = random_tensors((3, 5), (96, 5), 2, 4)
    tensors["gate_weight"].zero_()
    tensors["gate_bias"].copy_(torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 1.0] * 4))
    _, selected = call(tensors, 5, 4)
    assert selected.tolist() == [[1, 3, 4, 5, 7]] * 3


SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3e38, -3e38, float("inf"), -float("inf"), float("nan")]


@given(data=st.data())
@pytest.mark.parametrize("name", SETS)
def test_selection_equals_the_rule_on_adversarial_scores(name, data):
    native.use_instruction_set(name)
    values = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32), st.integers(-2, 2).map(float))
    row = data.draw(st.lists(values, min_size=1, max_size=70))
    k = data.draw(st.integers(1, len(row)))
    scores = torch.tensor([row])
    assert torch.equal(native.topk_groups(scores, k), topk_groups(scores, k))


@pytest.mark.parametrize("groups", [1, 7, 128, 1000, 4096])
def test_selection_equals_the_rule_on_usual_and_clustered_scores(instruction_set, groups):
    normal = torch.randn(20, groups)
    clustered = torch.cat([normal[:5].round(), normal[5:10].exp() ** 8, normal[10:15] * 1e-40, 1e30 + normal[15:]])
    for scores in (normal, clustered, torch.zeros(3, groups)):
        for k in {1, max(1, int(0.45 * groups)), groups}:
            assert torch.equal(native.topk_groups(scores, k), topk_groups(scores, k))


def change_by_optimizer(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()


@pytest.mark.parametrize("parameter", ["weight", "light_down", "light_up", "gate_weight"])
@pytest.mark.parametrize(
    "change",
    [change_by_optimizer, change_by_copy, change_one_value, change_data, change_through_data, change_in_inference_mode],
)
def test_changed_parameters_are_never_served_from_old_panels(parameter, change):
    layer = midl.MIDLinear(40, 64, active=0.5, group_size=16)
    x = torch.randn(10, 40)
    for _ in range(3):
        layer(x)
    assert native_packing.packed_bytes() > 0
    change(getattr(layer, parameter))
    for _ in range(3):
        with midl.kernels("reference"):
            y = layer(x)
        assert error_ratio(layer(x), y) < LIMITS[torch.float32]


def test_loaded_and_replaced_parameters_are_never_served_from_old_panels():
    x = torch.randn(10, 40)
    layer, other = (midl.MIDLinear(40, 64, active=0.5, group_size=16) for _ in range(2))
    layer(x), layer(x)
    layer.load_state_dict(other.state_dict())
    assert error_ratio(layer(x), other(x)) < LIMITS[torch.float32]
    layer(x)
    layer.light_up = torch.nn.Parameter(torch.randn(64, layer.rank))
    with midl.kernels("reference"):
        y = layer(x)
    assert error_ratio(layer(x), y) < LIMITS[torch.float32]


def autocast_inference(layer, x):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return layer(x)


@pytest.mark.parametrize("parameter", ["weight", "bias", "light_down", "light_up", "gate_weight", "gate_bias"])
@pytest.mark.parametrize("change", [change_by_copy, change_data, change_through_data, change_in_inference_mode])
def test_changed_parameters_are_never_served_from_old_casts(parameter, change):
    layer, x = midl.MIDLinear(40, 64, active=0.5, group_size=16), torch.randn(10, 40)
    for _ in range(3):
        autocast_inference(layer, x)
    change(getattr(layer, parameter))
    for _ in range(3):
        y = copy.deepcopy(layer).to(torch.bfloat16)(x.to(torch.bfloat16))
        assert torch.equal(autocast_inference(layer, x), y)


def test_autocast_keeps_casts_in_inference_alone():
    layer, x = midl.MIDLinear(40, 64, active=0.5, group_size=16), torch.randn(10, 40)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).sum().backward()
        layer(x)
    assert native_packing.packed_bytes() == 0
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        once = native_packing.packed_bytes()
        assert torch.equal(layer(x), y)
    assert once == sum(p.nbytes for p in layer.parameters()) / 2
    assert native_packing.packed_bytes() > once  # the casts are packed
    del layer
    assert native_packing.packed_bytes() == 0


def test_panels_die_with_their_weight():
    layer = midl.MIDLinear(40, 64, active=0.5, group_size=16)
    with torch.no_grad():
        layer(torch.randn(3, 40)), layer(torch.randn(3, 40))
    assert native_packing.packed_bytes() >= layer.weight.nbytes
    del layer
    assert native_packing.packed_bytes() == 0


def test_training_steps_keep_no_panels():
    layer = midl.MIDLinear(40, 64, active=0.5, group_size=16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    midl.kernels("auto")
    for _ in range(4):
        layer(torch.randn(8, 40)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert native_packing.packed_bytes() == 0


def test_inference_tensors_work_without_panels():
    with torch.inference_mode():
        layer = midl.MIDLinear(40, 64, active=0.5, group_size=16)
        x = torch.randn(10, 40)
        for _ in range(3):
            with midl.kernels("reference"):
                y = layer(x)
            assert error_ratio(layer(x), y) < LIMITS[torch.float32]
            layer.weight.mul_(1.5)
    assert native_packing.packed_bytes() == 0


def test_train_and_eval_give_the_same_bits():
    layer = midl.MIDLinear(100, 96, active=0.4, group_size=8)
    x = torch.randn(33, 100)
    assert torch.equal(layer.train()(x), layer.eval()(x))


@given(
    rows=st.integers(1, 40), depth=st.integers(1, 70), groups=st.integers(1, 12), group_size=st.integers(1, 40),
    rank=st.integers(1, 12), share=st.floats(0, 1), span=st.integers(1, 4),
    gate=st.sampled_from(["projection", "light"]),
    rule=st.sampled_from(["sigmoid", "hard"]), bias=st.booleans(), name=st.sampled_from(SETS),
    dtype=st.sampled_from(list(LIMITS)),
)  # fmt: skip
def test_any_layer_equals_the_reference(
    rows, depth, groups, group_size, rank, share, span, gate, rule, bias, name, dtype
):
    native.use_instruction_set(name)
    tensors = random_tensors(
        (rows, depth), (groups * group_size, depth), rank, group_size, gate=gate, bias=bias, dtype=dtype
    )
    check(tensors, max(1, round(share * groups)), group_size, span=span, rule=rule)


def test_unsupported_calls_name_the_reason():
    tensors = random_tensors((3, 8), (16, 8), 2, 4, dtype=torch.float64)
    with pytest.raises(KernelError, match=r"float64, expected float32 or bfloat16"):
        call(tensors, 2, 4)
    midl.kernels("auto")
    call(tensors, 2, 4)


def test_an_instruction_set_that_is_not_there_is_an_error():
    with pytest.raises(MIDLError, match=r"'mmx' is not an instruction set that this processor runs, expected one of"):
        native.use_instruction_set("mmx")


@pytest.mark.parametrize("name", ["baseline", "mmx"])
def test_the_environment_forces_an_instruction_set(name):
    code = "import midl; from midl.ops import native; print(native.instruction_set())"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "MIDL_CPU": name}, capture_output=True, text=True, check=False
    )
    if name == "baseline":
        assert run.stdout.strip() == "baseline"
    else:
        assert "MIDL_CPU='mmx' is not an instruction set that this CPU runs, expected one of" in run.stderr


@pytest.mark.parametrize("attributes", [{}, {"interface": "0123456789"}])
def test_a_module_built_from_other_sources_is_refused(attributes, tmp_path):
    code = f"""
import sys, types
stale = types.ModuleType("midl._native")
stale.__dict__.update({attributes})
sys.modules["midl._native"] = stale
import torch, midl
assert midl.MIDLinear(8, 16, rank=2)(torch.ones(3, 8)).shape == (3, 16)
midl.kernels("native")
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    interface = "01234567" if attributes else "none"
    reason = f"the extension midl._native was built from other sources (interface {interface}, expected "
    assert f"RuntimeWarning: {reason}" in run.stderr
    assert f"name='native' is not available: {reason}" in run.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_torch_and_the_kernels_share_one_openmp_runtime():
    # In a process of its own: other packages, scikit-learn for one, bring a runtime that only they use.
    code = """
import torch, midl
from midl.ops import native
with torch.no_grad():
    midl.MIDLinear(8, 16, rank=2)(torch.randn(3, 8))
with open("/proc/self/maps") as maps:
    print(*{line.split()[-1] for line in maps if any(name in line for name in ("gomp", "libomp", "iomp"))})
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(run.stdout.split()) == 1, run.stdout
