"""midl.adapt on whole models: the budget, the report, bad input, and the model left as it was."""

import copy
import types

import pytest
import torch
from adapted_models import assert_unchanged, cnn, mlp, state_of
from torch import nn

import midl
from midl.adaptation import calibrate, weigh_outputs
from midl.adaptation.measure import dense_outputs, output_error, simulate
from midl.adaptation.plan import ACTIVE, find_layers, list_choices
from midl.config import num_active_groups
from midl.conversion.families import family_of
from midl.errors import MIDLError


@pytest.mark.parametrize("budget", [1.3, 1.7])
@pytest.mark.parametrize(("make", "shape"), [(mlp, (32,)), (cnn, (3, 8, 8))])
def test_meets_the_budget_of_the_whole_model_as_count_flops_sees_it(make, shape, budget):
    model, x = make().train(), torch.randn(256, *shape)
    before = midl.count_flops(model, x[:128])
    weight = model[0].weight
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(x)
    report = midl.adapt(model, x, budget, group_size=4)
    assert before / midl.count_flops(model, x[:128]) == pytest.approx(report.flops_ratio)
    assert budget <= report.flops_ratio < budget * 1.15
    assert model.training
    assert model[0].weight is weight
    assert [layer.name for layer in report.layers] == [n for n, m in make().named_modules() if family_of(m) is not None]
    for layer in report.layers:
        assert layer.changed == isinstance(model.get_submodule(layer.name), midl.MIDLinear | midl.MIDConv2d)
        assert 0 <= layer.captured <= layer.oracle + 1e-6 <= 1 + 2e-6
    assert report.error == report.error_initialised == pytest.approx(output_error(model, [x], [expected]), rel=1e-3)
    assert report.error < 1
    assert f"{report.flops_ratio:.2f}x fewer FLOPs" in str(report)


def test_loses_less_than_a_plain_conversion_of_the_same_flops():
    model, x = mlp(), torch.randn(1024, 32) @ torch.diag(torch.logspace(0, -2, 32))
    plain = copy.deepcopy(model)
    expected = dense_outputs(model, [x])
    midl.convert_(plain, midl.MIDConfig(group_size=4, gate="light", interpolation="hard"), overrides={"4": None})
    report = midl.adapt(model, x, midl.count_flops(mlp(), x) / midl.count_flops(plain, x), group_size=4)
    assert report.error < 0.5 * output_error(plain, [x], expected)


def test_activations_that_work_in_place_change_nothing():
    def make(inplace):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 32, 3), nn.ReLU(inplace), nn.Conv2d(32, 32, 3), nn.ReLU(inplace), nn.Flatten(),
            nn.Linear(512, 64), nn.ReLU(inplace), nn.Linear(64, 4),
        )  # fmt: skip

    x = torch.randn(64, 3, 8, 8)
    models = {inplace: make(inplace) for inplace in (False, True)}
    reports = [midl.adapt(model, x, 1.5, group_size=8) for model in models.values()]
    assert reports[0] == reports[1]
    assert torch.equal(models[False](x), models[True](x))


@pytest.mark.parametrize(("make", "shape", "name"), [(mlp, (32,), "2"), (cnn, (3, 8, 8), "3")])
def test_what_is_measured_is_what_the_converted_layer_computes(make, shape, name):
    model, x = make().eval(), torch.randn(64, *shape)
    layers, _ = find_layers(model, 4, None)
    moments = calibrate(model, [x], layers)
    expected = dense_outputs(model, [x])
    choices = list_choices(model, name, layers[name], moments[name], [x], expected, rows=64, group_size=4, seed=0)
    assert choices[0].start is None
    start = choices[-1].start
    simulated = simulate(model, layers, {name: (start, 0.5)}, [x], expected)
    override = {name: start.config(0.5)}
    midl.convert_(model, filter_fn=lambda m, n: n == name, overrides=override)
    start.write(model.get_submodule(name))
    assert output_error(model, [x], expected) == pytest.approx(simulated, rel=1e-3)


@pytest.mark.parametrize(("group_size", "name"), [(32, "2"), (16, "2"), (4, "2"), (1, "2"), (2, "0"), (8, "0")])
def test_errors_between_the_measured_ways_are_near_those_that_would_be_measured(group_size, name):
    model, x = mlp().eval(), torch.randn(512, 32) @ torch.diag(torch.logspace(0, -2, 32))
    layers, _ = find_layers(model, group_size, None)
    moments = calibrate(model, [x], layers)
    weigh_outputs(model, [x], layers, moments)
    expected = dense_outputs(model, [x])
    choices = list_choices(
        model, name, layers[name], moments[name], [x], expected, rows=64, group_size=group_size, seed=0
    )
    groups = len(layers[name].weight) // group_size
    compared = 0
    for choice in choices[1:]:
        if choice.active == 0 or choice.active in {num_active_groups(active, groups) / groups for active in ACTIVE}:
            measured = simulate(model, layers, {name: (choice.start, choice.active)}, [x], expected)
            # Beyond a few hundredths of the largest error it is noise; an order of magnitude would mislead the plan.
            assert choice.error == pytest.approx(measured, rel=0.6, abs=3e-3 * max(c.error for c in choices))
            compared += 1
    assert compared > 8


def test_takes_batches_with_labels_and_keyword_arguments():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, *, x, scale):
            return {"features": self.body(x) * scale}

    labelled = [(torch.randn(64, 32), torch.zeros(64)) for _ in range(3)]
    assert midl.adapt(mlp(), labelled, group_size=4).flops_ratio >= 1.7
    named = [{"x": x, "scale": torch.tensor(2.0)} for x, _ in labelled]
    assert midl.adapt(Named(), named, group_size=4).flops_ratio >= 1.7


def test_rows_with_nan_are_left_out_and_reported():
    x = torch.randn(256, 32)
    x[7] = float("nan")
    report = midl.adapt(mlp(), x, group_size=4)
    assert all(layer.dropped_rows == 1 for layer in report.changed)
    assert report.error < 1
    assert "1 rows with NaN or Inf left out" in str(report)


def test_data_of_nothing_but_nan_is_an_error():
    model = mlp()
    state = state_of(model)
    with pytest.raises(MIDLError, match="all its 64 rows have NaN or Inf"):
        midl.adapt(model, torch.full((64, 32), float("nan")), group_size=4)
    assert_unchanged(model, state)


def test_layers_never_reached_stay_dense_and_say_so():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.spare = mlp(), nn.Linear(32, 32)

        def forward(self, x):
            return self.body(x)

    report = midl.adapt(Spare(), torch.randn(256, 32), group_size=4)
    assert {layer.name: layer.detail for layer in report.kept}["spare"] == "not reached by the data"


def test_layers_that_the_output_does_not_show_stay_dense_and_say_so():
    """As the pooler of a BERT whose last hidden state is read: what it is worth cannot be judged."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.pooler = mlp(), nn.Linear(32, 32)

        def forward(self, x):
            return {"hidden": self.body(x), "pooled": self.pooler(x)}

    report = midl.adapt(Pooled(), torch.randn(256, 32), 1.5, group_size=4)
    assert {layer.name: layer.detail for layer in report.kept}["pooler"].endswith("the model's output does not show it")


class Returns(nn.Module):
    """A model that makes something of its output."""

    def __init__(self, make=lambda y: y):
        super().__init__()
        self.net, self.make = mlp(), make

    def forward(self, x):
        return self.make(self.net(x))


class WithBuffer(Returns):
    """A model with a buffer whose elements share memory."""

    def __init__(self):
        super().__init__()
        self.register_buffer("pos", torch.arange(10.0).expand(4, 10))


@pytest.mark.parametrize(
    "make",
    [
        lambda y: {"ids": y.long(), "pred": y},
        lambda y: types.SimpleNamespace(logits=(y, y.sum())),
    ],
    ids=["dict", "logits"],
)
def test_the_first_tensor_of_floats_is_the_output(make):
    model = Returns(make)
    assert midl.adapt(model, [torch.randn(0, 32), torch.randn(64, 32)], group_size=4).flops_ratio >= 1.7


def test_batches_without_a_known_number_want_an_optimizer():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(torch.randn(64, 32))

    loader = torch.utils.data.DataLoader(Stream(), batch_size=16)
    with pytest.raises(MIDLError, match=r"adapt: data has no length, expected one .or an optimizer"):
        midl.adapt(mlp(), loader, group_size=4, epochs=1)
    report = midl.adapt(mlp(), loader, 1.3, group_size=4, epochs=1, optimizer=torch.optim.AdamW)
    assert len(report.losses) == 1


def test_frozen_and_shared_parameters_stay_frozen_and_shared():
    model = mlp()
    model[2].requires_grad_(False)
    tied = nn.ModuleDict({"a": model, "b": nn.Linear(32, 96)})
    tied["b"].weight = model[0].weight
    tied.forward = lambda x: model(x) + tied["b"](x).mean(-1, keepdim=True)
    midl.adapt(tied, torch.randn(256, 32), group_size=4)
    assert tied["b"].weight is tied["a"][0].weight
    assert not any(p.requires_grad for p in model[2].parameters())


def test_layers_that_are_converted_already_are_named():
    model = mlp()
    midl.convert_(model, midl.MIDConfig(group_size=4), overrides={"2": None, "4": None})
    report = midl.adapt(model, torch.randn(256, 32), 1.2, group_size=4)
    assert "is a MIDLinear already" in str(report)
    with pytest.raises(MIDLError, match="could be converted: 0: is a MIDLinear already"):
        midl.adapt(model, torch.randn(256, 32), 1.2, group_size=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 1.0}, r"budget=1.0, expected a FLOPs ratio above 1"),
        ({"budget": "2"}, r"budget='2', expected"),
        ({"budget": float("nan")}, r"budget=nan, expected"),
        ({"budget": 50}, r"budget=50 cannot be met, expected at most \d+\.\d+: \d+\.\d% of the FLOPs are outside"),
        ({"group_size": 0}, r"group_size=0, expected a positive int"),
        ({"max_active": 1.1}, r"max_active=1.1, expected None or a share of the neurons, from 0 to 1"),
        ({"max_active": "all"}, r"max_active='all', expected None or a share"),
        ({"max_active": 0.0, "light_alone": False}, r"max_active=0 cannot be met, expected at least 0\.\d+, which"),
        ({"group_size": 7}, r"nothing in the Sequential could be converted: 0: group_size=7 does not divide its 96"),
        ({"filter_fn": lambda m, n: False}, r"nothing in the Sequential could be converted: 0: filter_fn returned"),
        ({"data": torch.randn(64, 31)}, r"the Sequential does not take the data, a batch of shape \(64, 31\)"),
        ({"data": []}, r"data is empty"),
        ({"data": 3}, r"data is a int, expected a tensor or an iterable"),
        ({"data": ["a"]}, r"data has a batch of type str"),
        ({"model": nn.Sequential(nn.ReLU())}, r"nothing in the Sequential could be converted: it has no dense layers"),
        ({"epochs": -1}, r"epochs=-1, expected an int of at least 0"),
        ({"epochs": 1, "data": iter([torch.randn(64, 32)])}, r"epochs=1 with data that can be gone through once"),
        ({"model": nn.Linear(32, 96)}, r"model is itself a Linear"),
        ({"model": 3}, r"model is a int, expected torch.nn.Module"),
        ({"budget": 10**400}, r"budget=1e\+300 cannot be met"),
        ({"elastic": (0.2, 1)}, r"elastic=\(0.2, 1\) with epochs=0, expected epochs"),
        ({"epochs": 1, "elastic": 0.5}, r"adapt: elastic=0.5, expected \(low, high\)"),
        ({"epochs": 1, "elastic": (0.1, 0.2, 0.3)}, r"adapt: elastic=\(0.1, 0.2, 0.3\), expected \(low, high\)"),
        ({"epochs": 1, "elastic": (-0.1, 1)}, r"adapt: elastic: active=-0.1"),
        ({"lr": "a"}, r"adapt: lr='a', expected a number above 0"),
        ({"kd_ratio": "a"}, r"adapt: kd_ratio='a', expected a share"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)], 0.1)}, r"adapt: optimizer is a SGD, expected something"),
        ({"loss": "mse"}, r"adapt: loss is a str, expected something to call"),
        ({"task_loss": "ce"}, r"adapt: task_loss is a str"),
        ({"filter_fn": "0"}, r"adapt: filter_fn is a str"),
        ({"ffn": midl.conversion.FFNBlock("0", "1", "2")}, r"adapt: ffn is a FFNBlock, expected a bool or a list"),
        ({"ffn": None}, r"adapt: ffn is a NoneType"),
        ({"seed": "a"}, r"adapt: seed='a', expected an int"),
        ({"seed": 2**62}, r"adapt: seed=\d+, expected an int of at most"),
        ({"model": WithBuffer(), "budget": 50}, r"budget=50 cannot be met"),
        ({"model": Returns(lambda y: y.sum())}, r"returns a tensor of shape \(\), expected outputs for every input"),
        ({"model": Returns(lambda y: y[:, :0])}, r"returns a tensor of shape \(64, 0\)"),
        ({"model": Returns(lambda y: y.long())}, r"returns a Tensor, expected a float tensor"),
        ({"data": [torch.randn(0, 32)]}, r"data is empty"),
    ],
)  # fmt: skip
def test_bad_input_is_a_clear_error_and_leaves_the_model_as_it_was(change, message):
    call = {"model": mlp().train(), "data": torch.randn(64, 32), "group_size": 4, **change}
    state = state_of(call["model"]) if isinstance(call["model"], nn.Module) else None
    with pytest.raises(MIDLError, match=message):
        midl.adapt(**call)
    if state is not None:
        assert_unchanged(call["model"], state)


def test_the_nearest_budget_that_an_error_names_can_be_met():
    x = torch.randn(256, 32)
    with pytest.raises(MIDLError) as caught:
        midl.adapt(mlp(), x, 50, group_size=4)
    nearest = float(str(caught.value).split("at most ")[1].split(":")[0])
    assert midl.adapt(mlp(), x, nearest, group_size=4).flops_ratio >= nearest


def test_inference_tensors_are_an_error():
    with torch.inference_mode():
        model = mlp()
    with pytest.raises(MIDLError, match="tensors made in inference mode"):
        midl.adapt(model, torch.randn(64, 32), group_size=4)
    with pytest.raises(MIDLError, match="called in inference mode"), torch.inference_mode():
        midl.adapt(mlp(), torch.randn(64, 32), group_size=4)


def test_works_where_gradients_are_off():
    with torch.no_grad():
        report = midl.adapt(mlp(), torch.randn(64, 32), 1.3, group_size=4, epochs=1)
    assert len(report.losses) == 1


def test_a_distillation_that_diverges_leaves_the_model_as_it_was():
    model = cnn().train()
    state = state_of(model)
    with pytest.raises(MIDLError, match="the loss of epoch 1 is"):
        midl.adapt(model, torch.randn(64, 3, 8, 8), group_size=4, epochs=1, loss=lambda s, t: (s * float("inf")).sum())
    assert_unchanged(model, state)


def test_distillation_lowers_the_error_and_keeps_the_budget():
    model, x = mlp(), torch.randn(512, 32)
    report = midl.adapt(model, x, 2.0, group_size=8, epochs=5, optimizer=lambda p: torch.optim.Adam(p, 1e-3))
    assert len(report.losses) == 5
    assert report.error < 0.8 * report.error_initialised
    assert report.flops_ratio >= 2.0
    assert "after 5 epochs of distillation" in str(report)


def test_the_same_seed_gives_the_same_model():
    torch.manual_seed(3)
    first, x = mlp(), torch.randn(256, 32)
    second = copy.deepcopy(first)
    for model in (first, second):
        midl.adapt(model, x, group_size=4, epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_an_adapted_model_survives_save_and_load(tmp_path):
    pytest.importorskip("safetensors")
    model, x = mlp(), torch.randn(256, 32)
    midl.adapt(model, x, group_size=4)
    midl.save(model, tmp_path / "m.safetensors")
    fresh = midl.load_(mlp(), tmp_path / "m.safetensors")
    assert torch.equal(fresh(x), model(x))


def test_uniform_allocation_gives_every_layer_one_density_and_meets_the_budget():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    x = torch.randn(256, 96)
    head_stays = {"filter_fn": lambda module, name: name != "4"}
    uniform, layerwise = copy.deepcopy(model), copy.deepcopy(model)
    reports = [
        midl.adapt(uniform, x, 1.6, group_size=1, allocation="uniform", **head_stays),
        midl.adapt(layerwise, x, 1.6, group_size=1, **head_stays),
    ]
    densities = [layer.active for layer in reports[0].changed]
    assert len(densities) == 2
    assert max(densities) - min(densities) <= 1 / 128
    assert all(report.flops_ratio >= 1.6 for report in reports)


def test_an_unknown_allocation_is_an_error():
    with pytest.raises(MIDLError, match=r"allocation='even', expected 'layerwise' or 'uniform'"):
        midl.adapt(mlp(), torch.randn(64, 32), allocation="even")


def _low_rank_network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(torch.randn(len(layer.weight), 6) @ torch.randn(6, layer.weight.shape[1]) / 20)
    return model.eval()


@pytest.mark.parametrize("allocation", ["layerwise", "uniform"])
def test_layers_of_low_rank_become_their_light_path_alone(allocation):
    model, x = _low_rank_network(), torch.randn(512, 64)
    expected = model(x)
    report = midl.adapt(model, x, 5, group_size=16, allocation=allocation)
    assert [layer.active for layer in report.changed] == [0, 0]
    assert report.flops_ratio >= 5
    assert "light path alone" in str(report)
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)


def test_ranks_of_convolutions_that_are_light_paths_alone_fill_blocks_of_channels():
    model = nn.Sequential(
        nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Conv2d(64, 96, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96 * 4, 10)
    )
    midl.adapt(model, torch.randn(256, 8, 6, 6), 1.7, filter_fn=lambda layer, name: name != "5")
    ranks = [layer.rank for layer in model if isinstance(layer, midl.MIDConv2d) and layer.active == 0]
    assert ranks
    assert all(rank < 16 or rank % 8 == 0 for rank in ranks)
    assert max(ranks) >= 16


@pytest.mark.parametrize("choice", [{"light_alone": False}, {"elastic": (0.2, 0.8), "epochs": 1}])
def test_a_full_path_stays_where_it_is_asked_for(choice):
    model = _low_rank_network()
    report = midl.adapt(model, torch.randn(512, 64), 1.5, group_size=16, **choice)
    assert all(layer.active > 0 for layer in report.changed)


def active_share(model, like):
    """Of the neurons of all layers that could be converted."""
    neurons = {name: m.weight.shape[0] for name, m in like.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    layers = {name: model.get_submodule(name) for name in neurons}
    active = sum(n * getattr(layers[name], "active", 1.0) for name, n in neurons.items())
    return active / sum(neurons.values())


@pytest.mark.parametrize("choices", [{"light_alone": False}, {}, {"light_alone": False, "allocation": "uniform"}])
def test_no_more_neurons_are_active_than_allowed(choices):
    dense, x = mlp()[:-1], torch.randn(512, 32)  # all of its layers may be converted
    free = copy.deepcopy(dense)
    without = midl.adapt(free, x, 1.2, group_size=4, **choices)
    share = active_share(free, dense)
    for limit in (1.0, 0.8 * share, 0.4 * share):
        model = copy.deepcopy(dense)
        report = midl.adapt(model, x, 1.2, group_size=4, max_active=limit, **choices)
        assert report.flops_ratio >= 1.2
        assert active_share(model, dense) <= limit
        if limit == 1.0:
            assert str(model) == str(free)
            assert report.error == without.error
        else:
            assert report.error > without.error


def test_the_least_share_of_active_neurons_that_an_error_names_can_be_met():
    choices = {"group_size": 4, "light_alone": False}
    with pytest.raises(MIDLError, match=r"max_active=0.01 cannot be met, expected at least 0\.\d+, which") as error:
        midl.adapt(mlp(), torch.randn(512, 32), 1.2, max_active=0.01, **choices)
    least = float(str(error.value).split("at least ")[1].split(",")[0])
    midl.adapt(mlp(), torch.randn(512, 32), 1.2, max_active=least, **choices)
