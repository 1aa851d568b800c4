"""Folded batch normalisation: the same function and selection, every wrong model refused before anything changes."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import error_ratio
from torch import nn

import midl
from midl.errors import MIDLError
from midl.serving import fuse_batch_norm_


def random_norm_(norm):
    """Give a norm the statistics and parameters of one that was trained, a negative scale among them."""
    for name, low, high in (("running_mean", -1, 1), ("running_var", 0.2, 3), ("weight", -2, 2), ("bias", -1, 1)):
        values = getattr(norm, name)
        if values is not None:
            nn.init.uniform_(values, low, high)
    return norm.eval()


def random_(model):
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            random_norm_(module)
        elif isinstance(getattr(module, "gate_bias", None), nn.Parameter):
            nn.init.normal_(module.gate_bias)
    return model.eval()


def conv(**choices):
    return midl.MIDConv2d(6, 32, 3, active=0.5, rank=4, group_size=8, **choices)


MODELS = {
    "nn.Linear": lambda: (nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32)), (9, 12)),
    "nn.Conv1d": lambda: (nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)), (2, 3, 9)),
    "nn.Conv2d": lambda: (nn.Sequential(nn.Conv2d(6, 32, 3, bias=False), nn.BatchNorm2d(32)), (2, 6, 7, 7)),
    "nn.Conv3d": lambda: (nn.Sequential(nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4)), (2, 2, 3, 4, 5)),
    "affine=False": lambda: (nn.Sequential(conv(), nn.BatchNorm2d(32, affine=False)), (2, 6, 7, 7)),
    "MIDLinear": lambda: (
        nn.Sequential(midl.MIDLinear(12, 32, active=0.5, rank=4, group_size=8), nn.BatchNorm1d(32)), (9, 12),
    ),
    "light alone": lambda: (
        nn.Sequential(midl.MIDLinear(12, 32, active=0, rank=4, group_size=8), nn.BatchNorm1d(32)), (9, 12),
    ),
    **{
        str(choices): lambda choices=choices: (nn.Sequential(conv(**choices), nn.BatchNorm2d(32)), (2, 6, 7, 7))
        for choices in (
            {}, {"bias": False}, {"gate": "light"}, {"gate": "light", "bias": False}, {"interpolation": "hard"},
            {"select": "image"}, {"span": 3}, {"threshold": 0.0, "most": 0.75},
            {"padding_mode": "reflect", "padding": 1},
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("name", MODELS)
def test_the_fused_model_computes_and_selects_the_same(name, kernels):
    model, shape = MODELS[name]()
    random_(model)
    fused, x = copy.deepcopy(model), torch.randn(shape)
    assert fuse_batch_norm_(fused) == [("0", "1")]
    assert isinstance(fused[1], nn.Identity)
    with torch.no_grad(), midl.kernels(kernels):
        for _ in range(4):
            assert error_ratio(fused(x), model(x)) < 2e-6
        if name.startswith("nn."):
            return
        with midl.record_activity(model) as before:
            model(x)
        with midl.record_activity(fused) as after:
            fused(x)
    assert torch.equal(before["0"].usage, after["0"].usage)


def test_the_models_of_photographs_lose_every_norm():
    from midl.lab.models import ResNet

    dense = ResNet(10, widths=(8, 16, 32)).build()
    model = random_(copy.deepcopy(dense))
    midl.convert_(model, midl.MIDConfig(active=0.5, group_size=8), filter_fn=lambda _, name: "residual" in name)
    fused, x = copy.deepcopy(model), torch.randn(3, 3, 32, 32)
    names = fuse_batch_norm_(fused)
    assert ("stage2.residual.body.conv1", "stage2.residual.body.norm1") in names
    assert len(names) == 5
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert fused.stage1.conv.weight.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert error_ratio(fused(x), model(x)) < 1e-5


def test_half_precision_folds_to_its_rounding():
    model = random_(nn.Sequential(conv(gate="light"), nn.BatchNorm2d(32)))
    half, x = copy.deepcopy(model).bfloat16(), torch.randn(2, 6, 7, 7)
    fuse_batch_norm_(half)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert error_ratio(half(x.bfloat16()).float(), model(x)) < 0.2  # a close choice may fall the other way


class Branching(nn.Module):
    """A layer whose output two take, one called twice, a norm in front, a good pair."""

    def __init__(self):
        super().__init__()
        self.forked, self.forked_norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.twice, self.twice_norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.first, self.last, self.last_norm = nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        h = self.forked(self.first(x))
        h = h + self.forked_norm(h)
        for _ in range(2):
            h = self.twice_norm(self.twice(h))
        return self.last_norm(self.last(h))


def test_only_pairs_that_mean_the_same_are_folded():
    model, x = random_(Branching()), torch.randn(5, 8)
    fused = copy.deepcopy(model)
    assert fuse_batch_norm_(fused) == [("last", "last_norm")]
    with torch.no_grad():
        assert error_ratio(fused(x), model(x)) < 2e-6
    hooked = copy.deepcopy(model)
    hooked.last.register_forward_hook(lambda *_: None)
    assert fuse_batch_norm_(hooked) == []
    parametrized = copy.deepcopy(model)
    nn.utils.parametrizations.weight_norm(parametrized.last)
    assert fuse_batch_norm_(parametrized) == []


def test_a_layer_whose_weight_is_also_used_elsewhere_stays():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, x):
            return nn.functional.linear(self.norm(self.up(x)), self.up.weight)

    assert fuse_batch_norm_(random_(Tied())) == []


def test_a_model_without_norms_needs_no_trace():
    class Untraceable(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    assert fuse_batch_norm_(Untraceable()) == []


class Choosing(nn.Module):
    """Control flow that torch.fx cannot follow."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(), nn.BatchNorm2d(32)

    def forward(self, x):
        return self.norm(self.conv(x)) if x.sum() > 0 else x


def test_where_tracing_fails_pairs_are_given_by_name():
    model, x = random_(Choosing()), torch.rand(2, 6, 7, 7)
    with pytest.raises(MIDLError, match=r"torch\.fx cannot follow .*pairs="):
        fuse_batch_norm_(model)
    fused = copy.deepcopy(model)
    assert fuse_batch_norm_(fused, pairs=[("conv", "norm")]) == [("conv", "norm")]
    assert error_ratio(fused(x), model(x)) < 2e-6


@pytest.mark.parametrize(
    ("change", "pairs", "words"),
    [
        (lambda model: model.train(), None, "1 is in training mode, expected model.eval"),
        (lambda model: setattr(model[1], "running_var", None), None, "without running statistics"),
        (lambda model: None, [("0", "2")], r"pair \('0', '2'\) is a MIDConv2d and a ReLU, expected one of"),
        (lambda model: None, [("0", "7")], "no module '7', expected one of"),
        (lambda model: None, [("0", "1"), ("0", "1")], r"name \['0', '1'\] more than once"),
        (lambda model: model.__setitem__(1, nn.BatchNorm2d(16).eval()), None, "num_features=16, expected 32"),
    ],
)
def test_a_wrong_model_is_an_error_and_stays_as_it_was(change, pairs, words):
    model = random_(nn.Sequential(conv(), nn.BatchNorm2d(32), nn.ReLU()))
    change(model)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    with pytest.raises(MIDLError, match=words):
        fuse_batch_norm_(model, pairs)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(values, after[name]) for name, values in before.items())


def test_something_else_than_a_module_is_an_error():
    with pytest.raises(MIDLError, match=r"model is a list, expected torch\.nn\.Module"):
        fuse_batch_norm_([])
