"""Every method on every kind of network: within its budget, trainable, and the same after saving and loading."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import midl
from midl.errors import MIDLError
from midl.lab.methods import METHODS, Budget, count_neurons, find, load
from midl.lab.methods.low_rank import LowRank
from midl.lab.methods.magnitude import Pruned
from midl.lab.models import MLP, Architecture, ResNet, Transformer
from midl.layers import MIDLayer

ARCHITECTURES: dict[str, Architecture] = {
    "mlp": MLP(64, (256, 256), 10),
    "resnet": ResNet(10),
    "transformer": Transformer(vocabulary=50, tokens=64, num_classes=2, width=64, inner=256),
}


@functools.cache
def budget_for(kind: str) -> Budget:
    return Budget.for_network(ARCHITECTURES[kind], 8)


def random_inputs(architecture: Architecture) -> torch.Tensor:
    example = architecture.example(4)
    return torch.randint(1, 50, example.shape) if not example.is_floating_point() else torch.randn(example.shape)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_keeps_its_budget_learns_and_survives_saving(name: str, kind: str, tmp_path: Path) -> None:
    architecture, budget, method = ARCHITECTURES[kind], budget_for(kind), find(name)
    dense = architecture.build()
    model = method.build(architecture, budget, dense if method.teacher else None)
    if method.fit is not None:
        method.fit(model, architecture, budget, [random_inputs(architecture) for _ in range(3)])
    dense_flops = midl.count_flops(architecture.build(), architecture.example())
    flops = method.flops(model, architecture)
    if method.meets_ratio:
        assert flops <= dense_flops / 1.7
        # magnitude has no light path to pay for, and twelve random rows can tell gated that more is not better.
        assert flops >= dense_flops / 2 or name in ("magnitude", "gated", "gated_long")
    x = random_inputs(architecture)
    if method.before_step is not None:
        method.before_step(model)
    F.cross_entropy(model(x), torch.zeros(4, dtype=torch.long)).backward()
    unused = {id(m.weight) for m in model.modules() if isinstance(m, MIDLayer) and m.active == 0}  # light path alone
    assert not unused or name == "adapted"
    learning = [p for p in model.parameters() if p.requires_grad and id(p) not in unused]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learning)
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    if method.settle is not None:
        method.settle(model, budget)
    model.eval()
    midl.save(model, tmp_path / "model.safetensors")
    again = load(method, architecture, budget, tmp_path / "model.safetensors")
    assert torch.equal(again(x), model(x))
    assert method.flops(again, architecture) == flops


@pytest.mark.parametrize(
    ("name", "active"), [("dense", 1.0), ("narrow", 1.0), ("low_rank", 0.0), ("magnitude", 0.45), ("scratch", 0.45)]
)
def test_active_neurons_are_counted(name: str, active: float) -> None:
    architecture, budget = ARCHITECTURES["mlp"], budget_for("mlp")
    model = find(name).build(architecture, budget, None)
    measured = {}
    if any(isinstance(m, MIDLayer) for m in model.modules()):
        with midl.record_activity(model) as activity:
            model(torch.randn(16, 64))
        measured = {layer: a.fraction_active for layer, a in activity.items()}
    found, neurons = count_neurons(model, architecture.layer_names, measured)
    assert found / neurons == pytest.approx(active, abs=0.02)
    assert neurons == 512 or name == "narrow"


def test_what_must_stay_dense_lowers_the_layers_budget_and_at_last_their_active_share() -> None:
    small_head, large_head = (Budget.for_network(MLP(64, (256, 256), classes), 8) for classes in (10, 100))
    assert 1.7 < small_head.flops_ratio < large_head.flops_ratio
    assert small_head.active == 0.45
    assert large_head.active < 0.45
    assert large_head.active == pytest.approx(0.9 / large_head.flops_ratio, abs=1e-3)
    with pytest.raises(MIDLError, match=r"flops_ratio=1\.7 cannot be met: \d+ of the network's \d+ FLOPs"):
        Budget.for_network(MLP(8, (16,), 1000), 8)


def test_pruning_keeps_the_neurons_of_largest_norm() -> None:
    linear, conv = nn.Linear(6, 10), nn.Conv2d(3, 10, 3, stride=2, padding=1)
    for layer, x in ((linear, torch.randn(5, 6)), (conv, torch.randn(2, 3, 9, 9))):
        pruned = Pruned(layer, keep=4)
        norms = layer.weight.detach().flatten(1).norm(dim=1)
        dropped = norms.argsort()[:6]
        expected = layer(x)
        expected[(..., dropped) if layer is linear else (slice(None), dropped)] = 0
        torch.testing.assert_close(pruned(x), expected)


def test_low_rank_at_full_rank_is_the_dense_layer() -> None:
    for layer, x in (
        (nn.Linear(6, 10), torch.randn(5, 6)),
        (nn.Conv2d(2, 20, 3, stride=2, padding=1, dilation=2, bias=False), torch.randn(2, 2, 9, 9)),
    ):
        rank = min(layer.weight.flatten(1).shape)
        torch.testing.assert_close(LowRank(layer, rank)(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("substitute", [lambda layer: LowRank(layer, 2), lambda layer: Pruned(layer, 2)])
def test_other_layers_cannot_be_substituted(substitute: object) -> None:
    with pytest.raises(MIDLError, match=r"dense is a BatchNorm1d, expected nn\.Linear or nn\.Conv2d"):
        substitute(nn.BatchNorm1d(4))  # type: ignore[operator]


def test_winners_replace_the_light_path_at_the_same_cost_and_losers_give_the_bias() -> None:
    architecture, budget = ARCHITECTURES["mlp"], budget_for("mlp")
    model = find("k_winners").build(architecture, budget, None)
    layer = model.get_submodule("hidden1")
    assert isinstance(layer, MIDLayer)
    assert layer.active > 0.45
    assert not layer.light_up.any()
    y = layer(torch.randn(8, 64))
    losers = (y == layer.bias).view(8, -1, 8).all(-1)
    assert (losers.sum(1) == layer.num_groups - layer.num_selected).all()


def test_elastic_draws_its_budget_from_the_range_and_settles_on_the_budgets() -> None:
    architecture, budget = ARCHITECTURES["mlp"], budget_for("mlp")
    method = find("elastic")
    model = method.build(architecture, budget, architecture.build())
    assert method.before_step is not None
    assert method.settle is not None
    drawn = set()
    for _ in range(20):
        method.before_step(model)
        drawn.add(model.get_submodule("hidden1").active)  # type: ignore[arg-type]
    assert len(drawn) == 20
    assert all(0.2 <= active <= 0.6 for active in drawn)  # type: ignore[operator]
    method.settle(model, budget)
    assert model.get_submodule("hidden2").active == budget.active


def test_an_unknown_method_is_an_error() -> None:
    with pytest.raises(MIDLError, match=r"method='magic' is unknown, expected one of \['dense', 'distilled'"):
        find("magic")
