"""Grouping: permutations nobody can see, found only where that is so."""

import copy

import pytest
import torch
from torch import nn

import midl
from midl.adaptation import calibrate, find_chains, group_neurons, order_neurons, permute
from midl.adaptation.measure import dense_outputs
from midl.conversion.families import family_of


def layers_of(model):
    return {name: m for name, m in model.named_modules() if family_of(m) is not None}


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, bias=False), nn.BatchNorm2d(12),
        nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(12 * 4, 16), nn.BatchNorm1d(16), nn.GELU(),
        nn.Linear(16, 5),
    )  # fmt: skip


def test_a_permutation_through_norms_pools_and_flattening_leaves_the_output():
    model = cnn()
    model(torch.randn(32, 3, 8, 8))  # running statistics that differ between channels
    model.eval()
    x = torch.randn(4, 3, 8, 8)
    before, chains = model(x), find_chains(model, layers_of(model))
    assert list(chains) == ["0", "3", "8"]
    for chain in chains.values():
        parameter, value = chain.layer.weight, chain.layer.weight.detach().clone()
        order = torch.randperm(len(value))
        permute(chain, order)
        assert chain.layer.weight is parameter
        assert torch.equal(chain.layer.weight, value[order])
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


def residual():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(x + self.a(x))

    return Residual()


def with_hook():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[0].register_forward_hook(lambda m, args, out: None)
    return model


def shared_module():
    relu, linear = nn.ReLU(), nn.Linear(4, 4)
    return nn.Sequential(linear, relu, linear, relu)


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    "model",
    [
        residual(), with_hook(), shared_module(), tied(),
        nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1), nn.Linear(4, 4)),
        nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=2)),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Linear(4, 4)),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
    ],
)  # fmt: skip
def test_no_chain_where_the_order_can_be_seen_or_is_not_known_to_be_hidden(model):
    assert find_chains(model, layers_of(model)) == {}


def test_neurons_that_matter_together_come_to_share_a_group():
    """Four patterns of rows, dealt to the neurons in turn: sorting by pattern makes every group all or nothing."""
    energy = torch.eye(4).repeat_interleave(25, 0).repeat(1, 4) * torch.rand(100, 16).add(1)
    groups = (order_neurons(energy, 4) % 4).view(4, 4)
    assert (groups == groups[:, :1]).all()
    assert sorted(order_neurons(energy, 4).tolist()) == list(range(16))


def test_a_permutation_that_somebody_sees_is_undone():
    class Peeking(nn.Module):
        """Runs the sequence, and reads some neurons past it."""

        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

        def forward(self, x):
            return self.body(x) + self.body[0](x)[:, 0:16:4]

    model, batches = Peeking(), [torch.randn(64, 8)]
    before = copy.deepcopy(model.state_dict())
    layers = {"body.0": model.body[0]}
    moments, expected = calibrate(model, batches, layers), dense_outputs(model, batches)
    assert group_neurons(model, layers, moments, batches, expected, group_size=4) == set()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_moments_follow_the_neurons():
    for n, d in ((8, 20), (20, 8)):
        layer, x = nn.Linear(d, n), torch.randn(50, d)
        moments = calibrate(nn.Sequential(layer), [x], {"0": layer})["0"]
        order = torch.randperm(n)
        with torch.no_grad():
            layer.weight.copy_(layer.weight[order])
            layer.bias.copy_(layer.bias[order])
        expected = calibrate(nn.Sequential(layer), [x], {"0": layer})["0"].principal_outputs()
        found = moments.permuted(order).principal_outputs()
        torch.testing.assert_close(found.energies, expected.energies)
        assert (found.readers @ expected.directions).abs().diagonal()[:4].min() > 0.99


def test_grouping_lowers_the_error_of_an_adapted_model():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 8))
    with torch.no_grad():  # eight clusters of neurons, dealt out of order
        centres = torch.randn(8, 16) * 2
        dense[0].weight.copy_(centres.repeat(16, 1) + 0.3 * torch.randn(128, 16))
        dense[0].bias.fill_(-4.0)
    x, errors = torch.randn(2048, 16), []
    for group in (False, True):
        model = copy.deepcopy(dense)
        report = midl.adapt(model, x, 1.5, group_size=16, group=group, light_alone=False)
        errors.append(report.error)
        assert report.changed[0].regrouped == group
    assert errors[1] < 0.8 * errors[0]
