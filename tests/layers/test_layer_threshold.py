"""Layers with a threshold: set, shown, copied, saved, served, compiled and watched; inputs differ in what they take."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers import error_ratio
from torch import nn

import midl
from midl import MIDFFN, MIDConfig, MIDConv2d, MIDLinear
from midl.errors import MIDLError
from midl.layers.base import observers
from midl.ops.dispatch import unavailable_reason
from midl.serving import pack_

needs_native = pytest.mark.skipif(unavailable_reason("native") is not None, reason="native kernels are not built")
BUILDS = {
    "linear": (lambda **c: MIDLinear(16, 64, rank=4, group_size=2, **c), (20, 16)),
    "conv2d": (lambda **c: MIDConv2d(3, 32, 3, rank=4, group_size=2, **c), (3, 3, 7, 6)),
    "image": (lambda **c: MIDConv2d(3, 32, 3, rank=4, group_size=2, select="image", **c), (9, 3, 7, 6)),
    "ffn": (lambda **c: MIDFFN(16, 64, 8, rank=4, group_size=2, **c), (20, 16)),
}
builds = pytest.mark.parametrize(("build", "shape"), BUILDS.values(), ids=BUILDS)


def selection_of(layer, x):
    seen = []

    def observe(_, selected):
        seen.append(selected)

    observers.append(observe)
    try:
        layer(x)
    finally:
        observers.remove(observe)
    return seen[0]


@builds
def test_inputs_take_between_one_group_and_the_most(build, shape):
    layer = build(active=0.25, threshold=0.05, most=0.5)
    selected = selection_of(layer, torch.randn(shape))
    sizes = (selected >= 0).sum(-1)
    assert selected.shape[-1] == layer.num_slots == layer.num_groups // 2
    assert layer.num_selected == layer.num_groups // 4
    assert sizes.min() >= 1
    assert sizes.max() <= layer.num_slots
    assert len(sizes.unique()) > 1


@builds
def test_without_a_threshold_most_means_nothing(build, shape):
    torch.manual_seed(1)
    layer = build(active=0.25, most=0.5)
    torch.manual_seed(1)
    plain = build(active=0.25)
    x = torch.randn(shape)
    assert torch.equal(layer(x), plain(x))
    assert layer.num_slots == plain.num_slots == plain.num_selected


def test_a_threshold_shows_and_goes_with_the_budget():
    layer = MIDLinear(16, 64, rank=4, active=0.25)
    plain = repr(layer)
    layer.threshold = -0.5
    layer.config = layer.config.replace(most=0.5)
    assert "threshold=-0.5, most=0.5" in repr(layer)
    assert eval(repr(layer)).config == layer.config
    assert copy.deepcopy(layer).threshold == -0.5
    layer.threshold = None
    assert repr(layer) == plain
    layer.threshold = 0.25
    layer.active = 0.25
    assert repr(layer) == plain


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "high"])
def test_a_threshold_is_a_finite_number(value):
    layer = MIDLinear(16, 64, rank=4)
    with pytest.raises(MIDLError, match=r"threshold=.*, expected a finite number or None"):
        layer.threshold = value


def test_set_active_takes_thresholds_away_unless_it_fails():
    model = nn.Sequential(MIDLinear(16, 64, rank=4, threshold=0.1, most=0.9), nn.Linear(64, 10))
    config = model[0].config
    with pytest.raises(MIDLError, match="cannot be met"):
        midl.set_active(model, flops_ratio=1000, example_inputs=torch.zeros(1, 16))
    assert model[0].config == config
    midl.set_active(model, 0.3)
    assert (model[0].active, model[0].threshold, model[0].num_slots) == (0.3, None, 19)


def test_elastic_distillation_leaves_thresholds_as_they_were():
    teacher = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    student = copy.deepcopy(teacher)
    midl.convert_(student, MIDConfig(group_size=4), overrides={"2": None})
    student[0].threshold = 0.1
    midl.adaptation.distil(student, teacher, [torch.randn(8, 16)] * 2, epochs=1, elastic=(0.2, 0.6))
    assert student[0].threshold == 0.1


@builds
def test_every_way_to_call_a_layer_follows_its_threshold(build, shape):
    layer, x = build(active=0.25, most=0.75).eval(), torch.randn(shape)
    if isinstance(layer, MIDFFN):
        nn.init.normal_(layer.light_up)
    for threshold in (0.05, -0.2, None, 0.3):
        layer.threshold = threshold
        with midl.kernels("reference"):
            expected = layer(x)
        for kernels in ("auto", "dense", *([] if unavailable_reason("native") else ["native"])):
            with midl.kernels(kernels), torch.no_grad():
                for _ in range(4):  # panels from the second call on, prepared calls then
                    assert error_ratio(layer(x), expected) < 2e-6
                for one in x.split(1):
                    layer(one)


@needs_native
def test_a_prepared_layer_follows_a_changed_threshold():
    layer, x = MIDLinear(32, 256, rank=4, group_size=16, interpolation="hard").eval(), torch.randn(5, 32)
    outputs = []
    with torch.no_grad(), midl.kernels("native"):
        for threshold in (None, 0.1, 9.0, None):
            layer.threshold = threshold
            outputs.append([layer(x) for _ in range(4)])
    assert all(torch.equal(first, other) for first, *others in outputs for other in others)
    assert not torch.equal(outputs[0][0], outputs[1][0])
    assert not torch.equal(outputs[1][0], outputs[2][0])
    assert torch.equal(outputs[0][0], outputs[3][0])


@needs_native
def test_a_packed_layer_keeps_its_threshold():
    model = nn.Sequential(MIDLinear(32, 256, rank=4, group_size=16, threshold=0.05, most=0.8)).eval()
    x = torch.randn(9, 32)
    with torch.no_grad(), midl.kernels("native"):
        expected = model(x)
        assert pack_(model) == ["0"]
        assert torch.equal(model(x), expected)
        model[0].threshold = 9.0
        assert not torch.equal(model(x), expected)


def test_compiled_layers_follow_a_changed_threshold():
    layer, x = MIDLinear(16, 64, rank=4, threshold=0.1), torch.randn(7, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for threshold in (0.1, -0.1, None):
        layer.threshold = threshold
        torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()


def test_layers_with_a_threshold_train():
    torch.manual_seed(0)
    model = nn.Sequential(
        MIDLinear(16, 128, rank=4, group_size=8, threshold=0.0, most=0.5), nn.ReLU(), nn.Linear(128, 4)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    x = torch.randn(64, 16)
    target = x[:, :4].argmax(-1)
    losses = []
    for _ in range(60):
        losses.append(nn.functional.cross_entropy(model(x), target))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]


def test_vmap_goes_through():
    layer, x = MIDLinear(16, 64, rank=4, threshold=0.1), torch.randn(3, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))


def test_recorded_activity_is_what_was_really_taken():
    layer = MIDLinear(16, 64, rank=4, group_size=2, active=0.25, threshold=0.05, most=0.5)
    x = torch.randn(200, 16)
    sizes = (selection_of(layer, x) >= 0).sum(-1)
    with midl.record_activity(layer) as activity:
        layer(x[:80])
        layer(x[80:])
    found = activity[""]
    assert found.choices == 200
    assert found.sizes.tolist() == torch.bincount(sizes, minlength=33).tolist()
    assert found.fraction_active == pytest.approx(sizes.double().mean() / 32)
    assert found.counts.sum() == sizes.sum()
    ordered = sizes.sort().values
    for share, rank in ((0.0, 0), (0.05, 9), (0.5, 99), (0.95, 189), (1.0, 199)):
        assert found.quantile(share) == ordered[rank] / 32
    assert f"({found.quantile(0.05):.3f} to {found.quantile(0.95):.3f})" in repr(found)


def test_counted_flops_are_those_of_the_most_that_an_input_may_take():
    layer, most = (
        MIDLinear(16, 64, rank=4, active=a, **c) for a, c in ((0.25, {"threshold": 0.0, "most": 0.5}), (0.5, {}))
    )
    x = torch.randn(3, 16)
    assert midl.count_flops(layer, x) == midl.count_flops(most, x)
    assert layer.macs < most.macs


def test_files_keep_thresholds_and_older_files_have_none(tmp_path, monkeypatch):
    model = nn.Sequential(MIDLinear(16, 64, rank=4, threshold=0.123456789, most=0.7))
    midl.save(model, tmp_path / "new")
    again = midl.load_(nn.Sequential(nn.Linear(16, 64)), tmp_path / "new")
    assert again[0].config == model[0].config
    model[0].threshold = None
    fields = {k: v for k, v in model[0].config.to_dict().items() if k not in ("threshold", "most")}
    monkeypatch.setattr(MIDConfig, "to_dict", lambda self: json.loads(json.dumps(fields)))
    midl.save(model, tmp_path / "old")
    monkeypatch.undo()
    midl.load_(again, tmp_path / "old")
    assert again[0].config == model[0].config
    assert again[0].threshold is None


def test_reverted_and_converted_again_a_layer_has_no_threshold():
    model = nn.Sequential(MIDLinear(16, 64, rank=4, threshold=0.1))
    midl.revert_(model)
    assert type(model[0]) is nn.Linear
    midl.convert_(model, MIDConfig(rank=2))
    assert model[0].threshold is None
