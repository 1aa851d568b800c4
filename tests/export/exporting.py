"""Shared by the export tests: models whose programs return the selected groups too, and layers with many ties."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import midl
from midl.layers.base import MIDLayer, observers

DYNAMIC = torch.export.Dim.DYNAMIC

LINEAR_CHOICES: list[dict[str, Any]] = [
    {"gate": "projection"},
    {"gate": "projection", "span": 3, "group_size": 4},
    {"gate": "light", "interpolation": "hard", "group_size": 4},
    {"gate": "light", "interpolation": "hard", "span": 3, "bias": False},
    {"gate": "projection", "threshold": 1.5, "most": 0.7},
    {"gate": "light", "span": 3, "group_size": 4, "threshold": 0.5},
]
CONV_CHOICES: list[dict[str, Any]] = [
    {"gate": "projection", "stride": (2, 1), "padding": (1, 0)},
    {"gate": "light", "interpolation": "hard", "span": 2, "group_size": 4},
    {"gate": "projection", "select": "image", "padding": "same", "padding_mode": "reflect"},
    {"gate": "light", "interpolation": "hard", "select": "image", "group_size": 4, "bias": False},
    {"gate": "projection", "threshold": 1.5, "most": 0.7},
]


class WithSelections(nn.Module):
    """Apply each of ``models`` to the input; return their outputs and, after them, what their layers selected."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        selections: list[Tensor] = []

        def observe(layer: MIDLayer, selected: Tensor) -> None:
            selections.append(selected)

        observers.append(observe)
        try:
            return [model(x) for model in self.models], selections
        finally:
            observers.remove(observe)


def with_small_integers(layer: MIDLayer) -> MIDLayer:
    """Give ``layer`` weights in -2..2: exact products, so that equal scores are equal in every implementation."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape))
    return layer


def small_integers(*shape: int) -> Tensor:
    return torch.randint(-2, 3, shape).float()


def linear_layers() -> WithSelections:
    return WithSelections(*(with_small_integers(midl.MIDLinear(12, 32, rank=2, **c)) for c in LINEAR_CHOICES)).eval()


def conv_layers() -> WithSelections:
    return WithSelections(*(with_small_integers(midl.MIDConv2d(3, 16, 3, rank=2, **c)) for c in CONV_CHOICES)).eval()


def converted_network(**choices: Any) -> nn.Sequential:
    """A convolution with BatchNorm and two linear layers, one of which is kept dense; input (B, 3, 8, 8)."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(64, 32), nn.Linear(32, 10),
    ).eval()  # fmt: skip
    midl.convert_(model, midl.MIDConfig(group_size=4, rank=2).replace(**choices))
    return model


FFN_CHOICES: list[dict[str, Any]] = [
    {"activation": "gelu", "group_size": 4},
    {"activation": "silu", "gated": True, "bias": False, "interpolation": "hard"},
    {"activation": "gelu_tanh", "gated": True, "group_size": 2},
    {"activation": "relu", "interpolation": "hard"},
    {"activation": "relu", "interpolation": "hard", "threshold": 1.5},
    {"activation": "silu", "group_size": 4, "threshold": 1.5, "most": 0.7},
]


def ffns() -> WithSelections:
    return WithSelections(*(with_small_integers(midl.MIDFFN(12, 32, 8, rank=2, **c)) for c in FFN_CHOICES)).eval()


def dynamic_sizes(*axes: int) -> tuple[dict[int, Any]]:
    """Return torch.export's ``dynamic_shapes`` for one input of which ``axes`` vary."""
    return (dict.fromkeys(axes, DYNAMIC),)
