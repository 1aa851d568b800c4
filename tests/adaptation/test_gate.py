"""Sensitivities and gates: derived weights by hand, and a fitted gate that beats the light path's."""

import pytest
import torch
from torch import nn

from midl.adaptation import captured_energy, fit_gate, fit_light_path, initialise, sample_outputs
from midl.adaptation.calibrate import Moments, calibrate
from midl.errors import MIDLError


def light_path_of(model, x, rank):
    layer = model[0]
    principal = calibrate(model, [x], {"0": layer})["0"].principal_outputs()
    return fit_light_path(layer.weight.detach(), principal, rank), principal


def test_the_weight_of_a_neuron_is_the_squared_slope_of_all_that_follows():
    model = nn.Sequential(nn.Linear(6, 3, bias=False), nn.Linear(3, 5, bias=False))
    x = torch.randn(64, 6)
    path, _ = light_path_of(model, x, 2)
    sampled = sample_outputs(model, "0", model[0], path, [x], draws=400)
    torch.testing.assert_close(sampled.full, model[0](x))
    expected = model[1].weight.square().sum(0)  # ||dY / dy_j||^2
    torch.testing.assert_close(sampled.weight.mean(0), expected, rtol=0.1, atol=0)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.SiLU()])
def test_neurons_that_an_activation_switches_off_weigh_next_to_nothing(activation):
    model = nn.Sequential(nn.Linear(6, 4), activation, nn.BatchNorm1d(4), nn.Linear(4, 5)).eval()
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([-20.0, 20.0, -20.0, 20.0]))
    path, _ = light_path_of(model, torch.randn(64, 6), 2)
    weight = sample_outputs(model, "0", model[0], path, [torch.randn(64, 6)]).weight.mean(0)
    assert (weight[[0, 2]] < 1e-3 * weight[[1, 3]]).all()


def test_a_slope_counts_at_both_ends_of_the_step_from_light_to_full():
    """One neuron is off in the dense model and on where only its light path is known: its error still matters."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[-1.0], [1.0]]))
    path, _ = light_path_of(model, torch.ones(8, 1), 1)
    wrong = path._replace(up=-path.up)  # light = -full
    weight = sample_outputs(model, "0", model[0], wrong, [torch.ones(64, 1)]).weight
    assert 0 < float((weight[:, 0] > 0).float().mean()) < 1


def test_positions_of_images_are_sampled_as_rows():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    x = torch.randn(40, 3, 8, 8)
    path, _ = light_path_of_conv(model, x)
    sampled = sample_outputs(model, "0", model[0], path, [x[:20], x[20:]], rows=1000)
    assert sampled.full.shape == sampled.weight.shape == (1000, 8)


def light_path_of_conv(model, x):
    principal = calibrate(model, [x], {"0": model[0]})["0"].principal_outputs()
    return fit_light_path(model[0].weight.detach().flatten(1), principal, 2), principal


def test_a_layer_without_influence_weighs_nothing():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            self.layer(x)
            return x * self.layer.weight.sum()

    model = Detached()
    path = fit_light_path(
        model.layer.weight.detach(), Moments.empty(model.layer.weight.detach()).principal_outputs(), 1
    )
    assert not sample_outputs(model, "layer", model.layer, path, [torch.randn(3, 4)]).weight.any()
    model.requires_grad_(False)
    assert not sample_outputs(model, "layer", model.layer, path, [torch.randn(3, 4)]).weight.any()


def test_fitting_recovers_a_ranking_that_the_code_holds():
    code = torch.randn(4000, 6)
    truth = torch.randn(20, 6)
    energy = (code @ truth.T).clamp(min=0).square()
    weight, bias = fit_gate(code, energy)
    scores = code @ weight.T.float() + bias.float()
    assert captured_energy(scores, energy, 8) > 0.95 * captured_energy(energy, energy, 8)


def test_a_constant_code_leaves_the_mean_energies_to_the_bias():
    weight, bias = fit_gate(torch.ones(50, 3), torch.rand(50, 4) * torch.tensor([1.0, 4.0, 2.0, 3.0]))
    assert weight.isfinite().all()
    assert (torch.ones(3).double() @ weight.T + bias).argsort().tolist() == [0, 2, 3, 1]


def test_captured_energy_lies_between_chance_and_the_oracle():
    energy, scores = torch.rand(200, 10), torch.rand(200, 10)
    assert captured_energy(scores, energy, 10) == pytest.approx(1)
    assert captured_energy(scores, energy, 3) == pytest.approx(0.3, abs=0.03)
    assert captured_energy(energy, energy, 3) > 0.4
    assert captured_energy(scores, torch.zeros(200, 10), 3) == 1


def test_the_fitted_gate_wins_where_the_light_path_ranks_the_wrong_groups():
    """What follows is |y|: groups of large negative outputs matter, and the light gate ranks them last."""

    class Absolute(nn.Module):
        def forward(self, x):
            return x.square()

    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 64), Absolute(), nn.Linear(64, 8))
    with torch.no_grad():
        model[0].bias.copy_(torch.linspace(-4, 0, 64))
    x = torch.randn(2000, 16)
    path, principal = light_path_of(model, x, 3)
    rows = sample_outputs(model, "0", model[0], path, [x])
    start = initialise(
        model[0].weight.detach(), model[0].bias, principal, rows, group_size=4, light_macs=4 * (16 + 64 + 16)
    )
    assert start.gate == "projection"
    k = 0.25
    light = start.light_path.up.unflatten(0, (16, 4)).mean(1)
    code = rows.full @ start.light_path.reader.T.float()
    light_scores = code @ light.T.float() + model[0].bias.detach().view(16, 4).mean(1)
    energy = rows.energy(code @ start.light_path.up.T.float(), 4)
    by_light = captured_energy(light_scores, energy, 4)
    by_gate, by_oracle = start.captured(k)
    assert by_light < by_gate <= by_oracle
    assert by_gate > by_light + 0.5 * (by_oracle - by_light)


def test_the_light_gate_wins_where_it_ranks_well_and_costs_nothing():
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8))
    x = torch.randn(2000, 16)
    path, principal = light_path_of(model, x, 3)
    rows = sample_outputs(model, "0", model[0], path, [x])
    start = initialise(model[0].weight.detach(), model[0].bias, principal, rows, group_size=1, light_macs=400)
    assert start.light_macs <= 400
    assert start.gate == "light"
    assert start.rank == 5


def test_a_light_path_that_costs_more_than_allowed_is_an_error():
    weight = torch.randn(8, 8)
    moments = Moments.empty(weight)
    moments.add(torch.randn(20, 8))
    rows = sample_outputs_of(weight)
    with pytest.raises(MIDLError, match="light_macs=15, expected at least 16"):
        initialise(weight, None, moments.principal_outputs(), rows, group_size=1, light_macs=15)


def sample_outputs_of(weight):
    from midl.adaptation import OutputRows

    return OutputRows(torch.randn(20, len(weight)), torch.ones(20, len(weight)))


def test_logits_of_different_rows_compare_where_that_is_asked_for():
    torch.manual_seed(0)
    size = torch.rand(500, 1) * 9 + 1
    code = torch.cat([size, torch.randn(500, 3)], 1)
    energy = (size * torch.rand(500, 8)) ** 2

    def follow_size(**options):
        weight, bias = fit_gate(code, energy, **options)
        return float(
            torch.corrcoef(torch.stack([(code.double() @ weight.T + bias).mean(1), size[:, 0].double()]))[0, 1]
        )

    assert follow_size(compare_rows=True) > 0.95
    assert abs(follow_size()) < 0.5
