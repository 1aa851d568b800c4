"""Budgets of time, on a clock that moves only while layers run: the plan, the report, and the model left as it was."""

import contextlib
import functools

import pytest
import torch
from adapted_models import assert_unchanged, cnn, mlp, state_of
from torch import nn

import midl
from midl.errors import MIDLError


def time_of(model, x, clock):
    start = clock()
    model(x)
    return clock() - start


@pytest.mark.parametrize("budget", [1.3, 1.8])
@pytest.mark.parametrize(("make", "shape"), [(mlp, (32,)), (cnn, (3, 8, 8))])
def test_meets_a_budget_of_time_and_leaves_no_trace_of_the_timing(set_clock, make, shape, budget):
    clock, model, x = set_clock(), make().train(), torch.randn(256, *shape)
    before = time_of(model, x[:1], clock)
    report = midl.adapt(model, x, budget, latency_inputs=x[:1], group_size=4)
    assert report.latency_ratio == pytest.approx(before / time_of(model, x[:1], clock))
    assert 0.97 * budget <= report.latency_ratio <= 1.15 * budget
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_times_of_layers_are_those_of_the_clock_and_interpolated_between(set_clock):
    set_clock()
    x = torch.randn(256, 32)
    report = midl.adapt(mlp(), x, 1.5, latency_inputs=x[:1], group_size=1, light_alone=False)
    assert report.changed
    for layer in report.layers:
        assert 1e9 * layer.latency_before == pytest.approx(layer.flops_before / 2)
        assert 1e9 * layer.latency_after == pytest.approx(layer.flops_after / 2, rel=0.02)


def test_layers_of_which_nothing_is_faster_stay_dense_and_say_so(set_clock):
    set_clock(sparse=lambda layer: layer.macs * (100 if layer.in_features == 32 else 1))
    report = midl.adapt(mlp(), torch.randn(256, 32), 1.5, latency_inputs=torch.randn(1, 32), group_size=2)
    assert {layer.name: layer.detail for layer in report.kept} == {
        "0": "nothing is faster on this machine",
        **({} if report.layers[2].changed else {"4": "dense is worth its time"}),
    }
    assert report.layers[0].latency_before == report.layers[0].latency_after == 32 * 96 / 1e9
    assert "nothing is faster on this machine" in str(report)


@pytest.mark.parametrize("whole", [0.8, 1.25])
def test_where_times_do_not_add_up_the_plan_is_corrected_until_the_whole_model_meets_the_budget(set_clock, whole):
    """Sparse layers are slower, or faster, in the model as a user calls it than where they were watched."""
    clock = set_clock(sparse=lambda layer: layer.macs * (1 if layer._forward_hooks else whole))
    model, x = mlp(), torch.randn(256, 32)
    before = time_of(model, x[:1], clock)
    report = midl.adapt(model, x, 1.6, latency_inputs=x[:1], group_size=1)
    assert report.latency_ratio == pytest.approx(before / time_of(model, x[:1], clock))
    assert 0.97 * 1.6 <= report.latency_ratio <= 1.05 * 1.6
    assert (report.flops_ratio > 1.6) == (whole > 1)


def test_a_faster_plan_than_asked_for_is_better_than_none(set_clock):
    """Two speeds are to be had: the one below the budget is no answer, the one above it is."""
    set_clock(sparse=lambda layer: 1000 if layer._forward_hooks else 2000)
    report = midl.adapt(
        mlp(), torch.randn(256, 32), 2.5, latency_inputs=torch.randn(1, 32), group_size=4,
        filter_fn=lambda module, name: name != "4",
    )  # fmt: skip
    assert report.latency_ratio == pytest.approx((32 * 96 + 96 * 96 + 960) / (2 * 2000 + 960))


def test_a_budget_that_cannot_be_met_names_the_nearest_that_can(set_clock):
    set_clock(other=lambda module: 6000 if isinstance(module, nn.ReLU) else 0)
    model, x = mlp().train(), torch.randn(256, 32)
    call = {"latency_inputs": x[:1], "group_size": 4}
    state = state_of(model)
    with pytest.raises(MIDLError, match=r"budget=9 cannot be met on this machine, expected at most \d\.\d+: 3\d") as e:
        midl.adapt(model, x, 9, **call)
    assert_unchanged(model, state)
    nearest = float(str(e.value).split("at most ")[1].split(":")[0])
    assert midl.adapt(model, x, nearest, **call).latency_ratio >= nearest


@pytest.mark.parametrize("watched", [2.0, 0.5])
def test_nothing_faster_than_dense_is_an_error_that_says_so(set_clock, watched):
    """Neither a layer where it is watched, nor the whole model where layers were."""
    set_clock(sparse=lambda layer: (watched if layer._forward_hooks else 2) * layer.weight.numel())
    model = mlp()
    state = state_of(model)
    with pytest.raises(MIDLError, match="expected a FLOPs budget or other latency_inputs: on these no plan is faster"):
        midl.adapt(model, torch.randn(256, 32), 1.2, latency_inputs=torch.randn(1, 32), group_size=4)
    assert_unchanged(model, state)


def test_layers_that_cannot_be_judged_or_are_not_called_stay_dense(set_clock):
    """One that the output does not show, and one that the inputs to be served do not reach."""

    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.unseen, self.seldom = mlp(), nn.Linear(32, 32), nn.Linear(32, 10)

        def forward(self, x):
            y = self.body(x) if len(x) == 1 else self.body(x) + self.seldom(x)
            return {"y": y, "unseen": self.unseen(x)}

    set_clock()
    x = torch.randn(256, 32)
    report = midl.adapt(Spare(), x, 1.3, latency_inputs=x[:1], group_size=2)
    details = {layer.name: layer.detail for layer in report.kept}
    assert details["unseen"].endswith("the model's output does not show it")
    assert details["seldom"] == "nothing is faster on this machine"
    assert "x as fast" in str(report)


def test_an_interrupted_timing_leaves_the_model_as_it_was(set_clock):
    clock = set_clock()

    def interrupt(layer):
        if clock.now > 1e6:
            raise KeyboardInterrupt
        return layer.macs

    clock.sparse = interrupt
    model = cnn().train()
    state = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        midl.adapt(model, torch.randn(64, 3, 8, 8), 1.5, latency_inputs=torch.randn(1, 3, 8, 8), group_size=4)
    assert_unchanged(model, state)


@pytest.mark.parametrize(
    "choices",
    [
        {"allocation": "uniform"}, {"light_alone": False}, {"elastic": (0.2, 0.8), "epochs": 1}, {"epochs": 1},
        {"ffn": True}, {"ffn": True, "allocation": "uniform"}, {"group": False},
    ],
)  # fmt: skip
def test_goes_together_with_every_other_choice(set_clock, choices):
    clock, model, x = set_clock(), mlp(), torch.randn(256, 32)
    before = time_of(model, x[:1], clock)
    report = midl.adapt(model, x, 1.4, latency_inputs=x[:1], group_size=2, **choices)
    assert report.latency_ratio == pytest.approx(before / time_of(model.eval(), x[:1], clock))
    assert report.latency_ratio >= 0.97 * 1.4
    assert any(isinstance(m, midl.MIDFFN) for m in model.modules()) == ("ffn" in choices)


def test_a_block_takes_the_time_from_its_first_layer_to_its_last(set_clock):
    set_clock(other=lambda module: 77 if isinstance(module, nn.GELU) else 0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Sequential(nn.Linear(32, 96), nn.GELU(), nn.Linear(96, 32)))
    report = midl.adapt(model, torch.randn(256, 32), 1.4, latency_inputs=torch.randn(1, 32), group_size=4, ffn=True)
    block = next(layer for layer in report.layers if layer.name == "1.0")
    assert 1e9 * block.latency_before == pytest.approx(2 * 32 * 96 + 77)


def test_a_layer_that_is_called_twice_takes_both_times(set_clock):
    set_clock()

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(32, 32), nn.Linear(32, 8)

        def forward(self, x):
            return self.head(self.body(self.body(x).relu()))

    report = midl.adapt(Twice(), torch.randn(256, 32), 1.3, latency_inputs=torch.randn(1, 32), group_size=4)
    assert 1e9 * report.layers[0].latency_before == pytest.approx(2 * 32 * 32)


def test_takes_batches_as_data_has_them(set_clock):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, *, x, scale):
            return {"features": self.body(x) * scale}

    set_clock()
    x, scale = torch.randn(256, 32), torch.tensor(2.0)
    labelled = (x[:1], torch.zeros(1))
    assert midl.adapt(mlp(), x, 1.3, latency_inputs=labelled, group_size=4).latency_ratio >= 1.26
    named = {"x": x[:1], "scale": scale}
    assert (
        midl.adapt(Named(), [{"x": x, "scale": scale}], 1.3, latency_inputs=named, group_size=4).latency_ratio >= 1.26
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latency_inputs": 32}, r"latency_inputs are of type int, expected a tensor, a dict of tensors, or a tuple"),
        ({"latency_inputs": torch.randn(1, 31)}, r"does not take latency_inputs, a batch of shape \(1, 31\)"),
        ({"budget": 0.9}, r"budget=0.9, expected a latency ratio above 1"),
        ({"threshold": True}, r"latency_inputs with threshold=True, expected one of them"),
    ],
)
def test_bad_input_is_a_clear_error_and_leaves_the_model_as_it_was(change, message):
    model = mlp()
    state = state_of(model)
    with pytest.raises(MIDLError, match=message):
        midl.adapt(model, torch.randn(64, 32), **{"latency_inputs": torch.randn(1, 32), "group_size": 4, **change})
    assert_unchanged(model, state)


def test_the_report_has_times_with_a_budget_of_time_alone(set_clock):
    set_clock()
    x = torch.randn(256, 32)
    timed = midl.adapt(mlp(), x, 1.4, latency_inputs=x[:1], group_size=4)
    assert f"{timed.latency_ratio:.2f}x as fast" in str(timed)
    assert "time" in str(timed).splitlines()[0]
    counted = midl.adapt(mlp(), x, 1.4, group_size=4)
    assert counted.latency_ratio is counted.latency_before is counted.layers[0].latency_before is None
    assert "as fast" not in str(counted)
    assert "time" not in str(counted)


def test_runs_on_the_real_clock():
    """What it finds depends on the machine; that nothing is faster there is an answer too."""
    model, x = mlp(), torch.randn(64, 32)
    call = functools.partial(midl.adapt, model, x, 1.01, latency_inputs=x[:8], group_size=4)
    with contextlib.suppress(MIDLError):
        assert 0.97 * 1.01 <= call().latency_ratio < float("inf")
    assert model(x).isfinite().all()
