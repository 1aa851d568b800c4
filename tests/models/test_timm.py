"""timm's ResNet and MLP-Mixer, where timm can be imported (it needs torchvision)."""

from __future__ import annotations

import pytest
import torch

import midl

timm = pytest.importorskip("timm", reason="timm, which needs torchvision, cannot be imported", exc_type=ImportError)
CONFIG = midl.MIDConfig(rank=2, group_size=4, gate="light", interpolation="hard")


@pytest.mark.parametrize(("name", "size"), [("resnet18", 32), ("mixer_s32_224", 224)])
@torch.no_grad()
def test_converts_and_all_groups_give_the_dense_output(name, size):
    model = timm.create_model(name, pretrained=False, num_classes=10).eval()
    x = torch.randn(1, 3, size, size)
    expected = model(x)
    report = midl.convert_(model, CONFIG)
    assert {"Conv2d"} <= {c.kind for c in report.changed}
    with midl.record_activity(model) as activity:
        model(x)
    assert len(activity) == len(report.changed)
    midl.set_active(model, 1.0)
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
    midl.revert_(model)
    assert torch.equal(model(x), expected)
