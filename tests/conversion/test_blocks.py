"""convert_(ffn=...): FFNs are recognised by what they compute, replaced as blocks, saved, and put back as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import midl
from midl import MIDFFN
from midl.conversion import FFNBlock
from midl.conversion.blocks import activation_of
from midl.errors import CheckpointError, MIDLError

CONFIG = midl.MIDConfig(active=0.5, rank=2, group_size=4, gate="light", interpolation="hard")
EVERYTHING = CONFIG.replace(active=1.0)


class GatedMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 32, bias=False), nn.Linear(8, 32), nn.Linear(32, 8)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Apart(nn.Module):
    """The two layers in different modules, as in BERT, with a residual sum and a norm around."""

    def __init__(self, width=32):
        super().__init__()
        self.first = nn.ModuleDict({"dense": nn.Linear(8, width), "act": nn.GELU("tanh")})
        self.second = nn.ModuleDict({"dense": nn.Linear(width, 8), "norm": nn.LayerNorm(8)})

    def forward(self, x):
        hidden = self.first["act"](self.first["dense"](x))
        return self.second["norm"](x + self.second["dense"](hidden))


def sequential(*between):
    return nn.Sequential(nn.Linear(8, 32), *(between or (nn.ReLU(),)), nn.Linear(32, 8))


MODELS = {
    "sequential": lambda: nn.Sequential(sequential(), sequential(nn.GELU(), nn.Dropout(0.5))),
    "gated": lambda: nn.Sequential(nn.LayerNorm(8), GatedMLP()),
    "apart": lambda: nn.Sequential(Apart(), Apart(64)),
}
UPS = {"sequential": ["0.0", "1.0"], "gated": ["1.gate"], "apart": ["0.first.dense", "1.first.dense"]}


@pytest.mark.parametrize("name", list(MODELS))
def test_ffns_become_blocks_that_compute_the_same_and_go_back(name):
    model, x = MODELS[name]().eval(), torch.randn(5, 8)
    expected, before = model(x), dict(model.named_parameters())
    kinds = [type(m) for m in model.modules()]
    report = midl.convert_(model, EVERYTHING, ffn=True, example_inputs=x)
    blocks = {n: m for n, m in model.named_modules() if isinstance(m, MIDFFN)}
    assert list(blocks) == UPS[name]
    assert [c.name for c in report.changed if c.detail.startswith("FFN: active 1 ")] == UPS[name]
    torch.testing.assert_close(model(x), expected)
    everything = sum(2 * f.macs for f in blocks.values())
    assert sum(c.flops_after for c in report.changed) == everything
    assert report.flops_after == 5 * everything
    assert report.parameters_after - report.parameters_before == sum(
        c.parameters_after - c.parameters_before for c in report.layers
    )
    midl.revert_(model)
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(model(x), expected)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[n] is p for n, p in before.items())


def test_fewer_active_units_still_train_and_are_recorded():
    model, x = MODELS["apart"](), torch.randn(5, 8)
    midl.convert_(model, CONFIG, ffn=True)
    with midl.record_activity(model) as activity:
        model(x).sum().backward()
    assert list(activity) == UPS["apart"]
    assert activity.fraction_active == 0.5
    assert all(p.grad is not None for p in model.parameters())


def test_without_the_argument_the_layers_convert_one_by_one():
    model = MODELS["apart"]()
    midl.convert_(model, CONFIG)
    assert not any(isinstance(m, MIDFFN) for m in model.modules())


def test_blocks_are_known_by_their_first_layer_to_overrides_and_filter():
    model = MODELS["sequential"]()
    report = midl.convert_(model, CONFIG, ffn=True, overrides={"0.0": {"active": 0.25}, "*": None})
    assert model[0][0].active == 0.25
    assert {c.name: c.detail for c in report.kept}["1.0"] == "kept dense by overrides"
    assert {c.name: c.detail for c in report.kept}["1.3"] == "in the FFN 1.0"
    model = MODELS["sequential"]()
    report = midl.convert_(model, CONFIG, lambda module, name: not name.startswith("0."), ffn=True)
    assert isinstance(model[1][0], MIDFFN)
    assert type(model[0][2]) is nn.Linear


def test_users_name_blocks_of_their_own():
    model, x = MODELS["gated"]().eval(), torch.randn(5, 8)
    expected = model(x)
    block = FFNBlock(up="1.gate", value="1.up", activation="1.act", down="1.down")
    midl.convert_(model, EVERYTHING, ffn=[block])
    assert isinstance(model[1].gate, MIDFFN)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (FFNBlock("1.up", "1.act", "1.down", "1.gate"), "1.up is no FFN: they do not compute"),
        (FFNBlock("1.gate", "1.act", "1.down"), "1.gate is no FFN"),
        (FFNBlock("1.gate", "1.act", "1.dwn", "1.up"), "down='1.dwn' is no module of the Sequential"),
        (FFNBlock("1.gate", "1.up", "1.down"), "activation is a Linear, expected a module that computes one of"),
        (FFNBlock("1.gate", "1.act", "0"), "its down layer 0 no MID-L counterpart of LayerNorm"),
        ("1.gate", "ffn has a str, expected FFNBlock"),
    ],
)
def test_a_block_that_is_none_is_an_error_and_leaves_the_model(block, message):
    model, x = MODELS["gated"]().eval(), torch.randn(5, 8)
    expected = model(x)
    with pytest.raises(MIDLError, match=message):
        midl.convert_(model, CONFIG, ffn=[block])
    assert torch.equal(model(x), expected)


def nothing_between():
    return nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8))


def norm_between():
    return sequential(nn.ReLU(), nn.LayerNorm(32))


def other_activation():
    return sequential(nn.Tanh())


def shared_activation():
    act = nn.ReLU()
    return nn.Sequential(nn.Linear(8, 32), act, nn.Linear(32, 8), act, nn.Linear(8, 8))


class ReadTwice(GatedMLP):
    def forward(self, x):
        hidden = self.act(self.gate(x))
        return self.down(hidden * self.up(x)) + hidden.mean()


class FunctionalActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.down(self.up(x).relu())


@pytest.mark.parametrize(
    "build", [nothing_between, norm_between, other_activation, shared_activation, ReadTwice, FunctionalActivation]
)
def test_what_is_no_ffn_converts_layer_by_layer(build):
    model, x = nn.Sequential(build()).eval(), torch.randn(5, 8)
    expected = model(x)
    report = midl.convert_(model, EVERYTHING, ffn=True)
    assert not any(isinstance(m, MIDFFN) for m in model.modules())
    torch.testing.assert_close(model(x), expected)
    if build in (ReadTwice, shared_activation):
        assert any("; no FFN: " in c.detail for c in report.changed)


def test_frozen_layers_stay_frozen():
    model = MODELS["sequential"]().requires_grad_(False)
    midl.convert_(model, CONFIG, ffn=True)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_group_size_that_does_not_divide_leaves_the_block_dense():
    model = nn.Sequential(*MODELS["sequential"](), nn.Linear(8, 14))
    report = midl.convert_(model, CONFIG.replace(group_size=7), ffn=True)
    assert {c.name: c.detail for c in report.kept}["0.0"] == "group_size=7 does not divide hidden_features=32"


@pytest.mark.parametrize("name", list(MODELS))
def test_save_and_load_into_dense_converted_and_blocked_models(name, tmp_path):
    def build():
        torch.manual_seed(1)
        return MODELS[name]().eval()

    model, x = build(), torch.randn(5, 8)
    midl.convert_(model, CONFIG, ffn=True)
    expected = model(x)
    midl.save(model, tmp_path / "blocks.safetensors")
    dense = build()
    dense_output = dense(x)
    midl.save(dense, tmp_path / "dense.safetensors")
    layered, other = build(), build()
    midl.convert_(layered, CONFIG)
    midl.convert_(other, CONFIG.replace(rank=3), ffn=True)
    for target in (dense, layered, other, model):
        assert torch.equal(midl.load_(target, tmp_path / "blocks.safetensors")(x), expected)
        assert torch.equal(midl.load_(target, tmp_path / "dense.safetensors")(x), dense_output)
        midl.load_(target, tmp_path / "blocks.safetensors")
        midl.revert_(target)
        assert torch.equal(target(x), dense_output)


def test_a_file_with_blocks_does_not_fit_another_architecture(tmp_path):
    model = MODELS["gated"]()
    midl.convert_(model, CONFIG, ffn=True)
    midl.save(model, tmp_path / "m.safetensors")
    other = MODELS["apart"]()
    with pytest.raises(CheckpointError, match=r"has a MIDFFN at '1\.gate', the model has no module there"):
        midl.load_(other, tmp_path / "m.safetensors")
    broken = nn.Sequential(nn.LayerNorm(8), GatedMLP())
    broken[1].act = nn.Tanh()
    with pytest.raises(CheckpointError, match="activation is a Tanh"):
        midl.load_(broken, tmp_path / "m.safetensors")


def test_a_standalone_ffn_reverts_and_loads(tmp_path):
    model, x = nn.Sequential(MIDFFN(8, 16, rank=2)), torch.randn(3, 8)
    expected = model(x)
    midl.save(model, tmp_path / "m.safetensors")
    midl.revert_(model)
    dense = model(x)
    midl.convert_(model, CONFIG.replace(group_size=1))
    assert isinstance(model[0], MIDFFN)
    assert torch.equal(midl.load_(model, tmp_path / "m.safetensors")(x), expected)
    midl.revert_(model)
    assert torch.equal(model(x), dense)


def test_a_block_torn_apart_cannot_be_reverted():
    model = MODELS["apart"]()
    midl.convert_(model, CONFIG, ffn=True)
    model[0].second["dense"] = nn.Identity()
    with pytest.raises(MIDLError, match=r"whose down stood at '0\.second\.dense', which is not there any more"):
        midl.revert_(model)


def test_the_block_moves_with_the_module_around_it():
    model = MODELS["apart"]().eval()
    x = torch.randn(5, 8)
    expected = model(x)
    midl.convert_(model, EVERYTHING, ffn=True)
    larger = nn.ModuleDict({"inner": nn.Sequential(model[1], model[0])})
    midl.revert_(larger)
    assert torch.equal(larger["inner"][0](larger["inner"][1](x)), expected)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.ReLU(inplace=True), "relu"), (nn.SiLU(), "silu"),
        (nn.Mish(), None), (nn.Identity(), None), (nn.PReLU(), None), (nn.Softmax(-1), None), (nn.Flatten(0), None),
    ],
)  # fmt: skip
def test_activations_are_told_by_what_they_compute(module, name):
    assert activation_of(module) == name
