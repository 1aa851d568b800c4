"""huggingface_hub: models that build MID-L layers, and converted models, saved to and loaded from a folder."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import midl
from midl.errors import CheckpointError

huggingface_hub = pytest.importorskip("huggingface_hub")
from midl.hub import MIDHubMixin  # noqa: E402


class Built(nn.Module, huggingface_hub.PyTorchModelHubMixin):
    """Makes its own MID-L layer."""

    def __init__(self, width: int = 32, active: float = 0.45) -> None:
        super().__init__()
        self.layer = midl.MIDLinear(16, width, active=active, rank=2)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.layer(x))


class Dense(nn.Module, MIDHubMixin):
    """Is dense until convert_ changes it."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layer = nn.Linear(16, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.layer(x))


def test_a_model_that_builds_its_mid_layers_needs_only_huggingfaces_mixin(tmp_path):
    model, x = Built(width=64, active=0.25).eval(), torch.randn(3, 16)
    model.save_pretrained(tmp_path)
    loaded = Built.from_pretrained(tmp_path)
    assert loaded.layer.config == model.layer.config
    assert torch.equal(loaded(x), model(x))


def test_a_converted_model_comes_back_converted(tmp_path):
    model, x = Dense(width=64).eval(), torch.randn(3, 16)
    midl.convert_(model, midl.MIDConfig(active=0.25, rank=2, group_size=8, gate="light"))
    assert type(model.head) is nn.Linear
    model.save_pretrained(tmp_path)
    loaded = Dense.from_pretrained(tmp_path, map_location="cpu")
    assert loaded.layer.config == model.layer.config
    assert not loaded.training
    assert torch.equal(loaded(x), model(x))


def test_a_dense_model_comes_back_dense(tmp_path):
    model, x = Dense().eval(), torch.randn(3, 16)
    model.save_pretrained(tmp_path)
    loaded = Dense.from_pretrained(tmp_path)
    assert type(loaded.layer) is nn.Linear
    assert torch.equal(loaded(x), model(x))


def test_a_file_of_the_plain_mixin_is_an_error(tmp_path):
    Built().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"expected one written by midl\.save"):
        Dense.from_pretrained(tmp_path)
