"""MIDConfig: validation, JSON, and the arithmetic of the budget."""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midl import MIDConfig
from midl.config import auto_rank, layer_macs, num_active_groups
from midl.errors import MIDLError


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("active", -0.1, "a number in [0, 1]"),
        ("active", 1.01, "a number in [0, 1]"),
        ("active", float("nan"), "a number in [0, 1]"),
        ("active", "half", "a number in [0, 1]"),
        ("active", True, "a number in [0, 1]"),
        ("rank", 0, "a positive int or 'auto'"),
        ("rank", 2.5, "a positive int or 'auto'"),
        ("rank", "max", "a positive int or 'auto'"),
        ("flops_ratio", 0.0, "a number above 0"),
        ("flops_ratio", float("inf"), "a number above 0"),
        ("group_size", 0, "a positive int"),
        ("group_size", True, "a positive int"),
        ("span", -1, "a positive int"),
        ("gate", "softmax", "'projection', 'light'"),
        ("interpolation", "linear", "'sigmoid', 'hard'"),
        ("ste", "none", "'dense', 'selected'"),
        ("noise", -1.0, "at least 0"),
        ("noise", float("nan"), "at least 0"),
        ("threshold", float("nan"), "a finite number or None"),
        ("threshold", float("inf"), "a finite number or None"),
        ("threshold", "low", "a finite number or None"),
        ("most", 0.0, "a number in (0, 1]"),
        ("most", 1.5, "a number in (0, 1]"),
        ("select", "channel", "'position', 'image'"),
    ],
)
def test_a_bad_value_is_refused_by_name_value_and_expectation(field, value, expected):
    with pytest.raises(MIDLError) as caught:
        MIDConfig(**{field: value})
    assert f"MIDConfig: {field}={value!r}, expected" in str(caught.value)
    assert expected in str(caught.value)


def test_span_with_one_choice_per_image_is_refused():
    with pytest.raises(MIDLError, match=r"MIDConfig: span=4 with select='image', expected 1"):
        MIDConfig(select="image", span=4)


@pytest.mark.parametrize(
    "build", [MIDConfig().replace, lambda **f: MIDConfig.from_dict(f)], ids=["replace", "from_dict"]
)
def test_an_unknown_field_is_refused_with_the_known_ones(build):
    with pytest.raises(MIDLError, match=r"unknown field 'actve', expected one of \['active'"):
        build(actve=0.3)


def test_replace_validates_and_leaves_the_original():
    config = MIDConfig(active=0.5)
    with pytest.raises(MIDLError, match=r"active=2"):
        config.replace(active=2)
    assert config.replace(active=0.25).active == 0.25
    assert config.active == 0.5


def test_a_configuration_is_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MIDConfig().active = 0.3
    assert len({MIDConfig(), MIDConfig(), MIDConfig(active=0.3)}) == 2


configs = st.builds(
    MIDConfig,
    active=st.floats(0, 1, exclude_min=True),
    rank=st.just("auto") | st.integers(1, 4096),
    flops_ratio=st.floats(0.1, 100),
    group_size=st.integers(1, 512),
    gate=st.sampled_from(["projection", "light"]),
    interpolation=st.sampled_from(["sigmoid", "hard"]),
    ste=st.sampled_from(["dense", "selected"]),
    noise=st.floats(0, 10),
    select=st.sampled_from(["position", "image"]),
    threshold=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    most=st.floats(0, 1, exclude_min=True),
)


@settings(max_examples=100)
@given(configs)
def test_json_dict_and_repr_round_trip(config):
    assert MIDConfig.from_json(config.to_json()) == config
    assert MIDConfig.from_dict(config.to_dict()) == config
    assert eval(repr(config)) == config


@pytest.mark.parametrize(
    ("active", "groups", "k"), [(0.45, 128, 58), (0.001, 128, 1), (1, 7, 7), (1.0, 1, 1), (0.5, 1, 1), (0.45, 100, 45)]
)
def test_number_of_active_groups_is_rounded_and_at_least_one(active, groups, k):
    assert num_active_groups(active, groups) == k


@settings(max_examples=100)
@given(st.floats(0, 1, exclude_min=True), st.integers(1, 10000))
def test_number_of_active_groups_is_within_the_layer(active, groups):
    k = num_active_groups(active, groups)
    assert 1 <= k <= groups
    assert k == 1 or abs(k - active * groups) <= 0.5 + 1e-9


def test_macs_are_the_formula():
    d, n, r, size, k = 30, 48, 5, 4, 3
    light = layer_macs(d, n, r, num_selected=k, group_size=size, gate="light")
    assert light == r * d + r * n + k * size * d
    assert layer_macs(d, n, r, num_selected=k, group_size=size, gate="projection") == light + r * (n // size)


shapes = st.tuples(st.integers(1, 600), st.integers(1, 64), st.sampled_from([1, 2, 4, 32]))
budgets = {
    "shape": shapes,
    "active": st.floats(0.01, 1),
    "flops_ratio": st.floats(0.5, 20),
    "gate": st.sampled_from(["projection", "light"]),
}


@settings(max_examples=300)
@given(**budgets)
def test_auto_rank_is_the_largest_within_the_budget(shape, active, flops_ratio, gate):
    fan_in, num_groups, size = shape
    n = num_groups * size
    choices = {"active": active, "group_size": size, "gate": gate, "flops_ratio": flops_ratio, "owner": "test"}
    k = num_active_groups(active, num_groups)

    def fits(rank, k=k):
        macs = rank * fan_in + rank * n + (rank * num_groups if gate == "projection" else 0) + k * size * fan_in
        return macs * Fraction(str(flops_ratio)) <= fan_in * n

    try:
        rank = auto_rank(fan_in, n, **choices)
    except MIDLError as error:
        assert not fits(1)
        _check_advice(str(error), fan_in, n, choices)
        return
    assert fits(rank)
    assert rank == min(fan_in, n) or not fits(rank + 1)


def _check_advice(message, fan_in, n, choices):
    """What the message proposes must work: no further error."""
    if proposed := re.search(r"at most active=([0-9.e-]+) ", message):
        assert auto_rank(fan_in, n, **{**choices, "active": float(proposed[1])}) >= 1
    else:
        assert "no active at all" in message
    (ratio,) = re.findall(r"flops_ratio <= ([0-9.e-]+) at this active", message)
    assert auto_rank(fan_in, n, **{**choices, "flops_ratio": float(ratio)}) >= 1


def test_an_impossible_budget_is_refused_with_what_was_asked_and_what_would_do():
    with pytest.raises(MIDLError) as caught:
        auto_rank(64, 128, active=0.9, group_size=16, gate="projection", flops_ratio=1.7, owner="MIDLinear")
    message = str(caught.value)
    for part in (
        "MIDLinear: rank='auto'",
        "active=0.9",
        "group_size=16",
        "flops_ratio=1.7",
        "expected at most active=",
    ):
        assert part in message


def test_the_budget_is_met_exactly_in_decimal_arithmetic():
    # 242 / 2.2 is 109.99999999999999 in binary floating point.
    assert auto_rank(22, 11, active=0.25, group_size=1, gate="projection", flops_ratio=2.2, owner="test") == 1
