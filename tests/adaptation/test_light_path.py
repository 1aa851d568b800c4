"""The light path against the optimum that linear algebra promises."""

import copy

import pytest
import torch
from torch import nn

from midl.adaptation import Moments, calibrate, fit_light_path, weigh_outputs
from midl.layers.lowrank import truncated_svd


def output_error(weight, down, up, x):
    return float((x @ (weight - up @ down).T).square().sum(-1).mean())


def anisotropic(rows, d):
    """Inputs whose directions differ a hundredfold in size, not along the axes."""
    mix = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q * torch.logspace(0, -2, d, dtype=torch.float64)
    return torch.randn(rows, d, dtype=torch.float64) @ mix.T


def moments_of(weight, *batches):
    moments = Moments.empty(weight)
    for x in batches:
        moments.add(x @ weight.T)
    return moments


@pytest.mark.parametrize(("n", "d"), [(24, 40), (40, 24), (24, 24)])
def test_loses_the_energies_beyond_its_rank_and_less_than_the_svd_of_the_weight(n, d):
    weight, x = torch.randn(n, d, dtype=torch.float64), anisotropic(500, d)
    principal = moments_of(weight, x[:200], x[200:]).principal_outputs()
    assert principal.directions.shape == principal.readers.T.shape == (n, min(n, d))
    path = fit_light_path(weight, principal, rank=4)
    error = output_error(weight, path.down, path.up, x)
    # The optimum by Eckart and Young, from the singular values of the outputs themselves.
    optimum = float(torch.linalg.svdvals(x @ weight.T)[4:].square().sum() / len(x))
    assert error == pytest.approx(optimum, rel=1e-6)
    assert error == pytest.approx(float(principal.energies[4:].sum()), rel=1e-6)
    assert error < 0.7 * output_error(weight, *truncated_svd(weight, 4), x)


@pytest.mark.parametrize(("n", "d"), [(24, 40), (40, 24)])
def test_with_a_metric_the_weighted_error_is_the_least(n, d):
    weight, x = torch.randn(n, d, dtype=torch.float64), anisotropic(500, d)
    moments = moments_of(weight, x)
    plain = fit_light_path(weight, moments.principal_outputs(), rank=4)
    reads = torch.randn(n, n, dtype=torch.float64) * torch.logspace(0, -2, n, dtype=torch.float64)  # Y = reads @ f
    metric = reads.T @ reads + 1e-9 * torch.eye(n, dtype=torch.float64)
    moments.metric = metric if moments.basis is None else moments.basis.T @ metric @ moments.basis
    principal = moments.principal_outputs()
    path = fit_light_path(weight, principal, rank=4)
    lost = [output_error(reads @ weight, p.down, reads @ p.up, x) for p in (path, plain)]
    optimum = float(torch.linalg.svdvals(x @ (reads @ weight).T)[4:].square().sum() / len(x))
    assert lost[0] == pytest.approx(optimum, rel=1e-6)
    assert lost[0] == pytest.approx(float(principal.energies[4:].sum()), rel=1e-6)
    assert lost[0] < 0.95 * lost[1]
    torch.testing.assert_close(x @ path.down.T, (x @ weight.T) @ path.reader.T)


def test_the_metric_is_that_of_what_follows():
    """Two linear layers: J is the second weight for every row; through a convolution, the mean of J^T J."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).double().requires_grad_(False)
    x = [torch.randn(400, 6, dtype=torch.float64) for _ in range(4)]
    layers = {"0": model[0], "1": model[1]}
    moments = calibrate(model, x, layers)
    weigh_outputs(model, x, layers, moments, draws=8)
    basis = moments["0"].basis
    expected = basis.T @ model[1].weight.T @ model[1].weight @ basis
    expected = 0.95 * expected / expected.trace() * 6 + 0.05 * torch.eye(6)
    torch.testing.assert_close(moments["0"].metric, expected, atol=0.1, rtol=0.1)
    torch.testing.assert_close(moments["1"].metric, torch.eye(3).double(), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("trainable", [True, False])
def test_weighing_works_through_operations_in_place_and_leaves_the_model_alone(trainable):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 36, 4))
    model.requires_grad_(trainable).train()
    x = [torch.randn(10, 3, 8, 8)]
    before = copy.deepcopy(model.state_dict())
    layers = {"0": model[0], "3": model[3]}
    moments = calibrate(model, x, layers)
    weigh_outputs(model, x, layers, moments)
    assert all(float(found.metric.diagonal().mean()) == pytest.approx(1) for found in moments.values())
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_layer_without_influence_keeps_plain_squares():
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.unseen = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            self.unseen(x)
            return self.seen(x)

    model, x = Reading(), [torch.randn(20, 4)]
    layers = dict(model.named_children())
    moments = calibrate(model, x, layers)
    weigh_outputs(model, x, layers, moments)
    assert moments["seen"].metric is not None
    assert moments["unseen"].metric is None


def test_the_reader_gives_the_code_from_the_output():
    weight, x = torch.randn(12, 20, dtype=torch.float64), anisotropic(100, 20)
    path = fit_light_path(weight, moments_of(weight, x).principal_outputs(), rank=5)
    torch.testing.assert_close(x @ path.down.T, (x @ weight.T) @ path.reader.T)


def test_inputs_of_lower_rank_than_asked_for_are_met_exactly():
    weight = torch.randn(12, 20, dtype=torch.float64)
    x = torch.randn(50, 3, dtype=torch.float64) @ torch.randn(3, 20, dtype=torch.float64)
    path = fit_light_path(weight, moments_of(weight, x).principal_outputs(), rank=6)
    assert all(part.isfinite().all() for part in path)
    assert output_error(weight, path.down, path.up, x) < 1e-12


def test_inputs_that_are_all_zero_give_finite_factors():
    weight = torch.randn(6, 4, dtype=torch.float64)
    path = fit_light_path(weight, moments_of(weight, torch.zeros(10, 4, dtype=torch.float64)).principal_outputs(), 2)
    assert all(part.isfinite().all() for part in path)


def test_moments_of_a_convolution_are_those_of_its_output_without_bias():
    model = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.ReLU())
    x = torch.randn(4, 3, 7, 7)
    moments = calibrate(model, [x[:1], x[1:]], {"conv": model[0]})["conv"]
    f = nn.functional.conv2d(x, model[0].weight, None, 2, 1).movedim(1, -1).reshape(-1, 5).double()
    assert (moments.rows, moments.dropped) == (4 * 16, 0)
    torch.testing.assert_close(moments.second_moment, f.T @ f, rtol=1e-5, atol=1e-5)


def test_calibration_leaves_the_model_as_it_was_also_when_it_fails():
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(), nn.Linear(6, 2)).train()
    with pytest.raises(ValueError, match=r"does not take the data, a batch of shape \(3, 5\)"):
        calibrate(model, [torch.randn(3, 4), torch.randn(3, 5)], {"0": model[0]})
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())


def test_rows_with_nan_are_left_out_and_counted():
    model = nn.Sequential(nn.Linear(4, 6))
    x = torch.randn(10, 4)
    x[3, 1] = float("nan")
    found = calibrate(model, [x], {"0": model[0]})["0"]
    clean = calibrate(model, [x[torch.arange(10) != 3]], {"0": model[0]})["0"]
    assert (found.rows, found.dropped) == (9, 1)
    torch.testing.assert_close(found.second_moment, clean.second_moment)


def test_a_layer_that_the_data_never_reaches_has_no_rows():
    model = nn.ModuleDict({"used": nn.Linear(4, 6), "spare": nn.Linear(4, 6)})
    model.forward = lambda x: model["used"](x)
    found = calibrate(model, [torch.randn(5, 4)], dict(model))
    assert (found["used"].rows, found["spare"].rows) == (5, 0)
