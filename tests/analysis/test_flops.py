"""count_flops against counts made by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import midl
from midl.errors import MIDLError


def macs(d: int, n: int, r: int, groups: int, selected: int, size: int, gate: str = "projection") -> int:
    """The formula of the layer, multiply-adds per input row."""
    return r * d + r * n + (r * groups if gate == "projection" else 0) + selected * size * d


@pytest.mark.parametrize("gate", ["projection", "light"])
@pytest.mark.parametrize("group_size", [1, 32])
def test_linear_layer_equals_the_formula(gate, group_size):
    layer = midl.MIDLinear(100, 128, active=0.45, rank=7, group_size=group_size, gate=gate)
    groups = 128 // group_size
    expected = 2 * 12 * macs(100, 128, 7, groups, max(1, round(0.45 * groups)), group_size, gate)
    assert midl.count_flops(layer, torch.randn(3, 4, 100)) == expected


class ResidualNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(32)
        self.conv = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.short = nn.Conv2d(32, 64, 1, stride=2)
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        return self.fc((self.conv(x) + self.short(x)).mean((2, 3)))


@pytest.mark.parametrize("select", ["position", "image"])
def test_converted_residual_network_equals_the_hand_count(select):
    model, x = ResidualNet(), torch.randn(2, 3, 8, 8)
    midl.convert_(model, midl.MIDConfig(active=0.5, rank=4, group_size=16, select=select), overrides={"fc": None})

    def conv(fan_in: int, n: int, positions: int) -> int:
        groups = n // 16
        gates = 1 if select == "image" else positions
        return positions * macs(fan_in, n, 4, 0, round(0.5 * groups), 16) + gates * 4 * groups

    per_image = conv(27, 32, 64) + conv(288, 64, 16) + conv(32, 64, 16) + 64 * 10
    assert midl.count_flops(model, x) == 2 * 2 * per_image


def test_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), midl.MIDLinear(4, 4, rank=1))
    model[1].eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    midl.count_flops(model, torch.randn(8, 4))
    assert [m.training for m in model] == [True, False, True]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_counts_torchs_transformer_layer_in_full():
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    flops = midl.count_flops(layer, torch.randn(1, 5, 32))
    projections = 5 * 2 * (4 * 32 * 32 + 2 * 32 * 64)
    attention = 2 * (2 * 5 * 5 * 32)
    assert flops == projections + attention
    assert torch.backends.mha.get_fastpath_enabled()


def test_takes_tensors_tuples_and_keywords():
    class Add(nn.Module):
        def forward(self, a, b):
            return a @ b

    a, b = torch.randn(2, 3), torch.randn(3, 4)
    assert midl.count_flops(Add(), (a, b)) == midl.count_flops(Add(), {"a": a, "b": b}) == 2 * 2 * 3 * 4


def test_a_compiled_model_is_an_error():
    with pytest.raises(MIDLError, match="count_flops: model is compiled"):
        midl.count_flops(torch.compile(nn.Linear(2, 2)), torch.randn(1, 2))
