"""fit_ffn and adapt(ffn=...): blocks that start from data, within the budget of the model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import midl
from midl import MIDFFN
from midl.adaptation import fit_ffn
from midl.adaptation.blocks import find_blocks_to_adapt, list_block_choices, replaced, sample_inputs
from midl.adaptation.measure import dense_outputs, output_error
from midl.adaptation.plan import ACTIVE
from midl.config import num_active_groups
from midl.errors import MIDLError


def correlated(rows, d):
    """Inputs that vary mostly in a few directions, as real ones do."""
    return torch.randn(rows, d) @ (torch.randn(d, d) * torch.linspace(1, 0, d)[:, None] ** 3)


def ffn(**choices):
    return MIDFFN(16, 64, **{"rank": 4, "interpolation": "hard", "active": 0.4, **choices})


def relative_error(layer, x):
    with torch.no_grad():
        dense = layer.to_dense()(x)
        return float((layer(x) - dense).square().mean() / (dense - dense.mean(0)).square().mean())


@pytest.mark.parametrize("choices", [{}, {"gated": True, "activation": "silu"}, {"group_size": 4}], ids=str)
def test_a_fitted_start_loses_less_than_an_untrained_one_on_new_inputs(choices):
    layer, data = ffn(**choices), correlated(3000, 16)
    x, fresh = data[:2000], data[2000:]
    before = relative_error(layer, fresh)
    start = fit_ffn(layer, x)
    start.write(layer)
    after = relative_error(layer, fresh)
    assert after < 0.6 * before
    assert start.captured <= start.oracle + 1e-6
    assert after == pytest.approx(start.error, rel=0.3)


def test_more_rank_and_more_active_units_lose_less():
    layer, x = ffn(), correlated(2000, 16)
    ranks = [fit_ffn(ffn_like(layer, rank=rank), x).error for rank in (1, 4, 12)]
    densities = [fit_ffn(ffn_like(layer, active=active), x).error for active in (0.2, 0.5, 0.9)]
    assert ranks == sorted(ranks, reverse=True)
    assert densities == sorted(densities, reverse=True)


def ffn_like(layer, **choices):
    return MIDFFN._like(layer.to_dense(), layer.config, **choices)


def test_what_is_left_out_counts_with_its_mean():
    # Units that never change: nothing is lost whoever is selected.
    layer, x = ffn(), correlated(500, 16)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.normal_()
    fit_ffn(layer, x).write(layer)
    torch.testing.assert_close(layer(x), layer.to_dense()(x), rtol=1e-4, atol=1e-5)


def test_with_everything_active_nothing_is_lost():
    layer, x = ffn(active=1.0), correlated(500, 16)
    start = fit_ffn(layer, x)
    assert start.error < 1e-12
    assert start.captured == pytest.approx(1)
    assert not start.light_up.any()


def test_rows_with_nan_are_left_out():
    layer, x = ffn(), correlated(400, 16)
    broken = torch.cat([x, torch.full((3, 16), float("nan"))])
    assert fit_ffn(layer, broken).error == fit_ffn(layer, x).error
    with pytest.raises(MIDLError, match="inputs has 5 finite rows, expected at least 8"):
        fit_ffn(layer, x[:5])


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)), nn.LayerNorm(16),
        nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)), nn.Linear(16, 8),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("group_size", [1, 4])
def test_adapt_makes_blocks_within_the_budget_and_reverts_to_the_same_function(group_size):
    model, x = network(), correlated(512, 16)
    expected = model(x)
    report = midl.adapt(model, x, 1.5, ffn=True, group_size=group_size)
    assert report.flops_ratio >= 1.5
    assert [layer.name for layer in report.layers] == ["0.0", "2.0", "3"]
    blocks = [layer for layer in report.changed if layer.name != "3"]
    assert blocks
    for row in blocks:
        block = model.get_submodule(row.name)
        assert isinstance(block, MIDFFN)
        assert (block.rank, block.config.group_size) == (row.rank, group_size)
        assert row.flops_after == 2 * block.macs
        assert row.flops_before == 2 * block.dense_macs
        assert row.captured <= row.oracle + 1e-6
        assert row.regrouped == (group_size > 1)
    assert 0 < report.error < 0.5
    midl.revert_(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_adapted_blocks_lose_less_than_converted_ones():
    model, x = network(), correlated(512, 16)
    plain, expected = copy.deepcopy(model), [model(x).detach()]
    midl.adapt(model, x, 1.5, ffn=True, group_size=1, filter_fn=lambda module, name: name != "3")
    config = midl.MIDConfig(active=0.45, flops_ratio=1.6, interpolation="hard")
    midl.convert_(plain, config, ffn=True, overrides={"3": None})
    assert output_error(model, [x], expected) < 0.5 * output_error(plain, [x], expected)


def test_blocks_that_cannot_be_converted_stay_dense_with_a_reason():
    model, x = network(), correlated(256, 16)
    with pytest.raises(MIDLError, match="group_size=48 does not divide its 64 hidden units"):
        midl.adapt(model, x, 1.5, ffn=True, group_size=48)
    report = midl.adapt(model, x, 1.1, ffn=True, group_size=1, filter_fn=lambda module, name: name.startswith("2"))
    assert {row.name: row.detail for row in report.kept}["0.0"] == "filter_fn returned False"
    assert type(model[0][0]) is nn.Linear


def test_an_error_leaves_the_blocks_as_they_were():
    model, x = network(), correlated(256, 16)
    kinds, state = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    with pytest.raises(MIDLError, match=r"diverge|cannot be met|expected a finite"):
        midl.adapt(
            model, x, 1.5, ffn=True, group_size=4, epochs=1,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e30),
        )  # fmt: skip
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_blocks_distil_and_serve_several_budgets():
    model, x = network(), correlated(512, 16)
    report = midl.adapt(model, x, 1.5, ffn=True, group_size=1, epochs=2, elastic=(0.3, 0.6))
    assert report.losses[-1] < report.losses[0]
    for active in (0.3, 0.9):
        midl.set_active(model, active)
        assert model(x).isfinite().all()


@pytest.mark.parametrize("group_size", [1, 4, 16])
def test_errors_between_the_measured_ways_are_near_those_that_would_be_measured(group_size):
    torch.manual_seed(0)
    model, x = network().eval(), correlated(1024, 16)
    blocks, _ = find_blocks_to_adapt(model, True, group_size, None, set())
    name, block = next(iter(blocks.items()))
    inputs, expected = sample_inputs(model, blocks, [x]), dense_outputs(model, [x])
    choices = list_block_choices(model, block, inputs[name], [x], expected, rows=64, group_size=group_size)
    groups = block.sparse(midl.MIDConfig(rank=1, group_size=group_size)).num_groups
    compared = 0
    for choice in choices[1:]:
        if choice.active in {num_active_groups(active, groups) / groups for active in ACTIVE}:
            sparse = block.sparse(choice.start.config(choice.active))
            choice.start.write(sparse)
            with replaced(model, block.replacements(sparse)):
                measured = output_error(model, [x], expected)
            assert choice.error == pytest.approx(measured, rel=0.5, abs=3e-3 * max(c.error for c in choices))
            compared += 1
    assert compared > 8
