"""A convolution in channels-last order stays so when it becomes a MID-L layer: nothing is reordered at every call."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("safetensors")

import midl

FORMAT = torch.channels_last


def is_channels_last(t):
    return t.is_contiguous(memory_format=FORMAT) and not t.is_contiguous()


@pytest.mark.parametrize("active", [0, 0.5])
def test_the_light_path_has_the_weights_order_after_conversion_and_loading(active, tmp_path):
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3)).to(memory_format=FORMAT)
    converted, contiguous = copy.deepcopy(model), copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    config = midl.MIDConfig(active=active, rank=3, group_size=4)
    for network in (converted, contiguous):
        midl.convert_(network, config)
    midl.save(converted, tmp_path / "model.safetensors")
    loaded = midl.load_(copy.deepcopy(model), tmp_path / "model.safetensors")
    for network in (converted, loaded, copy.deepcopy(converted)):
        assert all(is_channels_last(network[i].light_down) for i in (0, 2))
        assert all(is_channels_last(network[i].weight) for i in (0, 2))
    assert not any(is_channels_last(contiguous[i].light_down) for i in (0, 2))
    x = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(converted(x), contiguous(x), rtol=1e-4, atol=1e-5)
    assert is_channels_last(converted(x.to(memory_format=FORMAT)))
