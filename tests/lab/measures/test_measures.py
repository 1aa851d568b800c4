"""The measures of a trained model: what they say of layers made by hand, and that they leave no trace."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import midl
from midl.errors import MIDLError
from midl.lab.data import Dataset, Split
from midl.lab.measures import MEASURES, measure_all
from midl.lab.measures.activity import measure_activity
from midl.lab.measures.corruptions import corruptions_for
from midl.lab.measures.gate import measure_gates
from midl.lab.measures.robustness import measure_robustness
from midl.lab.measures.smi import SETS, _Pool, measure_smi
from midl.lab.measures.watching import mid_layers, sample_test_rows, watch_layers
from midl.layers.base import observers
from midl.layers.logits import layer_logits
from midl.selection import topk_groups


def make_dataset(shape: tuple[int, ...], rows: int = 120, classes: int = 3) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(rows) * classes // rows  # sorted by class, as some data sets are
    x = torch.randn((rows, *shape), generator=generator) + y.view(-1, *[1] * len(shape))
    split = Split(x, y)
    return Dataset("made", classes, split, split, torch.zeros(1), torch.ones(1), "none")


def make_mlp(**choices: Any) -> nn.Sequential:
    choices = {"active": 0.5, "rank": 3, "group_size": 4, **choices}
    return nn.Sequential(midl.MIDLinear(8, 24, **choices), nn.ReLU(), nn.Linear(24, 3))


def make_cnn(**choices: Any) -> nn.Sequential:
    choices = {"active": 0.5, "rank": 3, "group_size": 4, **choices}
    conv = midl.MIDConv2d(2, 24, 3, padding=1, **choices)
    return nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 3))


class Transposed(nn.Module):
    """A sequence model: (rows, positions, 8) to logits."""

    def __init__(self, **choices: Any) -> None:
        super().__init__()
        self.layer = midl.MIDLinear(8, 24, **{"active": 0.5, "rank": 3, "group_size": 4, **choices})
        self.head = nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x).relu().mean(1))


CASES = {
    "mlp": (make_mlp, (8,), {}),
    "light gate": (make_mlp, (8,), {"gate": "light", "interpolation": "hard"}),
    "sequence": (Transposed, (7, 8), {}),
    "sequence with span": (Transposed, (7, 8), {"span": 3}),
    "images": (make_cnn, (2, 5, 5), {}),
    "images with span": (make_cnn, (2, 5, 5), {"span": 2}),
    "one choice per image": (make_cnn, (2, 5, 5), {"select": "image"}),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Dataset]:
    make, shape, choices = CASES[request.param]
    return make(**choices), make_dataset(shape)


def test_every_measure_is_json_and_leaves_no_trace(case: tuple[nn.Module, Dataset]) -> None:
    model, dataset = case
    model.train()
    state, before = torch.get_rng_state(), {name: t.clone() for name, t in model.state_dict().items()}
    first = measure_all(model, dataset, rows=30)
    assert json.loads(json.dumps(first)) == measure_all(model, dataset, rows=30)
    assert set(first) == set(MEASURES)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert not observers


def test_the_logits_are_those_the_layer_selects_by(case: tuple[nn.Module, Dataset]) -> None:
    model, dataset = case
    seen = []

    def see(name: str, x: torch.Tensor, y: torch.Tensor, selected: torch.Tensor) -> None:
        layer = mid_layers(model)[name]
        seen.append(torch.equal(topk_groups(layer_logits(layer, x), layer.num_selected), selected.flatten(0, 1)))

    with torch.no_grad(), midl.kernels("reference"), watch_layers(mid_layers(model), see):
        model(dataset.batch(dataset.test, slice(0, 10))[0])
    assert seen == [True]


def test_activity_counts_what_each_class_selects(case: tuple[nn.Module, Dataset]) -> None:
    model, dataset = case
    (layer,) = mid_layers(model).values()
    (by_class,) = measure_activity(model, dataset)["layers"].values()
    assert np.array(by_class).shape == (3, layer.num_groups)
    assert np.array(by_class).sum(1) == pytest.approx([layer.num_selected] * 3, abs=0.01)
    for label in range(3):
        x = dataset.test.x[dataset.test.y == label]
        with torch.no_grad(), midl.record_activity(model) as activity:
            model(x)
        (recorded,) = activity.values()
        assert by_class[label] == pytest.approx(recorded.usage.tolist(), abs=6e-4)


def test_a_class_without_rows_has_no_activity() -> None:
    dataset = make_dataset((8,))
    missing = Split(dataset.test.x[:40], dataset.test.y[:40])
    dataset = Dataset("made", 3, missing, missing, dataset.mean, dataset.std, "none")
    (by_class,) = measure_activity(make_mlp(), dataset)["layers"].values()
    assert by_class[0] is not None
    assert by_class[1:] == [None, None]


def test_gate_histograms_count_every_logit_once(case: tuple[nn.Module, Dataset]) -> None:
    model, dataset = case
    (layer,) = mid_layers(model).values()
    (gates,) = measure_gates(model, dataset, rows=50, bins=12)["layers"].values()
    for histogram in (gates["logits"], gates["values"]):
        assert len(histogram["edges"]) == 13
        assert sum(histogram["selected"]) * layer.num_groups == sum(histogram["all"]) * layer.num_selected
        assert sum(histogram["all"]) % (50 * layer.num_groups) == 0
    # The selected logits are the larger ones.
    middle = np.convolve(gates["logits"]["edges"], [0.5, 0.5], "valid")
    assert np.average(middle, weights=gates["logits"]["selected"]) > np.average(middle, weights=gates["logits"]["all"])


def test_smi_finds_the_groups_that_know_the_label() -> None:
    """Neurons 0 to 3 tell the class, the others are noise: it matters which of them a gate selects."""
    dataset = make_dataset((8,), rows=600)
    found = {}
    for chosen in ("informative", "noise"):
        model = make_mlp(active=1 / 6, gate="projection", interpolation="hard")
        layer = model[0]
        with torch.no_grad():
            layer.light_up.zero_()
            layer.weight.zero_()
            layer.weight[:4] = 1.0
            layer.weight[4:] = torch.randn(20, 8) @ (torch.eye(8) - 1 / 8)  # blind to the mean that tells the class
            layer.light_up.copy_(0.5 * torch.linalg.lstsq(layer.light_down.T, layer.weight.T).solution.T)
            layer.gate_weight.zero_()
            layer.gate_bias.copy_(torch.tensor([5.0, 0, 0, 0, 0, 0]))
            if chosen == "noise":
                layer.gate_bias.copy_(torch.tensor([0, 0, 5.0, 0, 0, 0]))
        found[chosen] = measure_smi(model, dataset, rows=600, slices=32)["overall"]["neurons"]
    assert found["informative"]["selected-random"]["low"] > 0.1
    assert found["informative"]["selected-unselected"]["low"] > 0.3
    assert found["noise"]["selected-random"]["high"] < 0


def test_smi_by_hand_on_the_masked_outputs() -> None:
    from midl.lab.measures.mutual_information import estimate_mutual_information
    from midl.lab.measures.smi import _directions

    model, dataset = make_mlp(), make_dataset((8,))
    report = measure_smi(model, dataset, slices=16)
    x, y = dataset.batch(dataset.test, slice(0, 120))
    with torch.no_grad():
        outputs = model[0](x)
        mask = torch.zeros(120, 6).scatter(1, topk_groups(layer_logits(model[0], x), 3).long(), 1.0)
    centred = ((outputs - outputs.mean(0)) * mask.repeat_interleave(4, dim=1)).double().numpy()
    expected = estimate_mutual_information(centred @ _directions(24, 16, 0), y.numpy()).mean()
    assert report["layers"]["0"]["inputs"]["selected"]["mean"] == pytest.approx(expected, abs=2e-3)


def test_smi_knows_which_choice_each_position_follows(case: tuple[nn.Module, Dataset]) -> None:
    model, dataset = case
    (layer,) = mid_layers(model).values()
    with torch.no_grad(), midl.kernels("reference"):
        layer.config = layer.config.replace(interpolation="hard")
        x = dataset.batch(dataset.test, slice(0, 5))[0]
        outputs = []
        with watch_layers({"": layer}, lambda name, x, y, selected: outputs.append(y)):
            model(x)
            active, layer.active = layer.active, 1.0
            model(x)
            layer.active = active
        # Groups whose output is not the one of the full path are those that were left.
        selected = torch.isclose(*outputs, rtol=0, atol=1e-7)
        selected = (selected.movedim(1, -1) if selected.dim() == 4 else selected).reshape(5, -1, 6, 4).all(-1)
        pool = _Pool(layer)
        with watch_layers({"": layer}, lambda name, x, y, chosen: pool.add(y, chosen)):
            model(x)
    assert torch.allclose(pool.share["selected"][0], selected.float().mean(1))


def test_smi_of_every_case_is_bounded_by_the_entropy_of_the_labels(case: tuple[nn.Module, Dataset]) -> None:
    (layer,) = measure_smi(*case, slices=8)["layers"].values()
    for view in layer.values():
        assert all(-0.1 < view[name]["mean"] < np.log(3) + 0.1 for name in SETS)
        assert all(view[name]["low"] <= view[name]["mean"] <= view[name]["high"] for name in view)


def test_models_without_mid_layers_have_robustness_alone() -> None:
    measures = measure_all(nn.Linear(8, 3), make_dataset((8,)))
    assert measures["activity"]["layers"] == measures["gate"]["layers"] == measures["smi"]["layers"] == {}
    assert measures["smi"]["overall"] == {}
    assert measures["robustness"]["curves"]


def test_robustness_starts_at_the_clean_accuracy_and_the_area_is_that_of_trapezoids() -> None:
    dataset = make_dataset((8,), rows=300)
    model = nn.Linear(8, 3)
    curves = measure_robustness(model, dataset)["curves"]
    x, y = dataset.batch(dataset.test, slice(None))
    clean = 100 * (model(x).argmax(-1) == y).float().mean().item()
    assert set(curves) == {"gaussian", "feature_dropout"}
    assert all(curve["accuracy"][0] == pytest.approx(clean, abs=1e-3) for curve in curves.values())
    accuracy = curves["feature_dropout"]["accuracy"]
    strengths = np.diff([0.0, 0.1, 0.2, 0.35, 0.5])
    middles = np.convolve(accuracy, [0.5, 0.5], "valid")
    assert curves["feature_dropout"]["area"] == pytest.approx((strengths * middles).sum() / 0.5, abs=2e-3)


@pytest.mark.parametrize("shape", [(8,), (2, 9, 9)])
def test_corruptions_of_strength_zero_change_nothing_and_grow(shape: tuple[int, ...]) -> None:
    dataset = make_dataset(shape)
    x, _ = dataset.batch(dataset.test, slice(0, 20))
    for corruption in corruptions_for(dataset).values():
        assert corruption.strengths[0] == 0
        damage = [
            (corruption.apply(x, strength, torch.Generator().manual_seed(0)) - x).square().mean().item()
            for strength in corruption.strengths
        ]
        assert damage[0] == 0
        assert damage == sorted(damage)
        assert damage[-1] > 0


def test_blur_keeps_flat_images_and_spreads_a_point_as_a_gaussian() -> None:
    from midl.lab.measures.corruptions import blur

    generator = torch.Generator()
    assert blur(torch.full((1, 2, 6, 6), 3.0), 1.5, generator) == pytest.approx(3.0, abs=1e-5)
    point = torch.zeros(1, 1, 21, 21)
    point[0, 0, 10, 10] = 1
    spread = blur(point, 2.0, generator)[0, 0]
    offsets = torch.arange(21.0) - 10
    assert float(spread.sum()) == pytest.approx(1, abs=1e-5)
    assert float((spread.sum(0) * offsets**2).sum()) == pytest.approx(4.0, rel=0.05)


def test_word_dropout_keeps_padding() -> None:
    from midl.lab.measures.corruptions import PADDING, UNKNOWN, drop_words

    ids = torch.tensor([[5, 6, 7, PADDING, PADDING]] * 100)
    dropped = drop_words(ids, 0.5, torch.Generator().manual_seed(0))
    assert (dropped[:, 3:] == PADDING).all()
    assert (dropped[:, :3] == UNKNOWN).float().mean() == pytest.approx(0.5, abs=0.1)


def test_the_sampled_rows_are_of_every_class_and_the_same_each_time() -> None:
    dataset = make_dataset((8,), rows=300)
    labels = torch.cat([y for _, y in sample_test_rows(dataset, 60)])
    assert len(labels) == 60
    assert set(labels.tolist()) == {0, 1, 2}
    assert torch.equal(labels, torch.cat([y for _, y in sample_test_rows(dataset, 60)]))


def test_an_ffn_block_has_activity_and_gates_but_no_outputs_of_single_neurons() -> None:
    model = nn.Sequential(midl.MIDFFN(8, 32, active=0.5, rank=3, group_size=4), nn.Linear(8, 3))
    measures = measure_all(model, make_dataset((8,)), rows=50)
    assert measures["activity"]["layers"].keys() == measures["gate"]["layers"].keys() == {"0"}
    assert measures["smi"]["layers"] == {}


@pytest.mark.parametrize(
    ("choice", "message"), [({"rows": 0}, "rows=0, expected at least 1"), ({"names": ["speed"]}, r"has \['speed'\]")]
)
def test_wrong_choices_are_errors(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(MIDLError, match=message):
        measure_all(make_mlp(), make_dataset((8,)), **choice)


def test_layers_that_select_nothing_are_left_out() -> None:
    model = nn.Sequential(make_mlp()[:2], midl.MIDLinear(24, 3, active=0, rank=2))
    found = measure_all(model, make_dataset((8,)), rows=40)
    assert json.dumps(found)
    assert list(mid_layers(model)) == ["0.0"]
