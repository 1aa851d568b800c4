"""refresh_normalization: new statistics where they help, and nothing else changed."""

import copy

import pytest
import torch
from torch import nn

import midl
from midl.adaptation import refresh_normalization
from midl.errors import MIDLError


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten(),
        nn.Linear(8 * 36, 5),
    ).eval()  # fmt: skip


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def test_statistics_are_those_of_all_rows_layer_after_layer() -> None:
    model = _network()
    x = torch.randn(64, 3, 10, 10)
    batches = list(x.split(16))
    wanted = copy.deepcopy(model).train()(x).detach()
    assert refresh_normalization(model, batches, [x], [wanted])
    first = model[0](x)
    torch.testing.assert_close(model[1].running_mean, first.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert [m.momentum for m in (model[1], model[4])] == [0.1, 0.1]
    assert not any(m.training for m in model.modules())
    assert model[1].num_batches_tracked == 0


def test_without_anything_to_judge_by_the_new_statistics_are_kept() -> None:
    model, x = _network(), torch.randn(64, 3, 10, 10)
    assert refresh_normalization(model, [x])
    torch.testing.assert_close(model[1].running_mean, model[0](x).mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_statistics_that_help_nothing_are_not_kept() -> None:
    model = _network()
    x = torch.randn(64, 3, 10, 10)
    before = _state(model)
    assert not refresh_normalization(model, [x], [x], [model(x).detach()])
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("x", [torch.randn(1, 3, 10, 10), torch.full((8, 3, 10, 10), torch.nan)], ids=["one", "nan"])
def test_inputs_without_statistics_change_nothing(x: torch.Tensor) -> None:
    model = _network()
    before = _state(model)
    assert not refresh_normalization(model, [x], [torch.randn(4, 3, 10, 10)], [torch.zeros(4, 5)])
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_an_error_leaves_momenta_and_modes() -> None:
    model = _network()
    with pytest.raises(MIDLError):
        refresh_normalization(model, [torch.zeros(4, 2, 10, 10)], [torch.zeros(4, 3, 10, 10)], [torch.zeros(4, 5)])
    assert [m.momentum for m in (model[1], model[4])] == [0.1, 0.1]
    assert not any(m.training for m in model.modules())


def test_adapt_moves_statistics_only_where_the_output_comes_nearer() -> None:
    model = _network()
    x = torch.randn(512, 3, 10, 10)
    with torch.no_grad():
        model.train()(x)
    model.eval()
    expected = model(x).detach()
    report = midl.adapt(model, x, 1.3, group_size=2)
    error = ((model(x) - expected).square().mean() / expected.var(0, correction=0).mean()).item()
    assert report.error_initialised == pytest.approx(error, rel=0.2)
