"""scratch: MID-L trained from its random start, by the paper's formula."""

from __future__ import annotations

from typing import Any

from torch import nn

from midl.config import MIDConfig
from midl.conversion import convert_
from midl.lab.methods.method import Budget, Method
from midl.lab.models import Architecture

__all__ = ["METHOD", "config", "convert_layers"]

# The paper's formula: on held-out MNIST rows hard interpolation and the light gate differed from it by less than seeds.
_CHOICES: dict[str, Any] = {"gate": "projection", "interpolation": "sigmoid", "ste": "selected"}


def config(budget: Budget) -> MIDConfig:
    """Return the layers' configuration."""
    return MIDConfig(
        active=budget.active, group_size=budget.group_size, flops_ratio=budget.flops_ratio, **_CHOICES
    )  # fmt: skip


def convert_layers(model: nn.Module, names: list[str], config: MIDConfig) -> nn.Module:
    """Convert the named layers of ``model`` in place and return the model.

    Raises:
        MIDLError: the configuration does not fit one of them.
    """
    # Named one by one, so that a layer the configuration does not fit is an error and not left dense.
    convert_(model, config, filter_fn=lambda module, name: name in names, overrides=dict.fromkeys(names, config))
    return model


def _build(architecture: Architecture, budget: Budget, teacher: nn.Module | None) -> nn.Module:
    return convert_layers(architecture.build(), architecture.layer_names, config(budget))


METHOD = Method("scratch", "MID-L scratch", _build, settings=_CHOICES)
