"""converted: the trained dense network turned into MID-L, then taught the dense network's answers."""

from __future__ import annotations

from typing import Any

from torch import nn

from midl.config import MIDConfig
from midl.lab.methods.method import Budget, Method
from midl.lab.methods.scratch import convert_layers
from midl.lab.models import Architecture

__all__ = ["CHOICES", "METHOD", "config"]

# The light path of a trained weight ranks its groups well without training, and with hard interpolation a converted
# layer starts as close to the dense one as its selection allows.
CHOICES: dict[str, Any] = {"gate": "light", "interpolation": "hard", "ste": "selected"}


def config(budget: Budget) -> MIDConfig:
    """Return the layers' configuration."""
    return MIDConfig(active=budget.active, group_size=budget.group_size, flops_ratio=budget.flops_ratio, **CHOICES)


def _build(architecture: Architecture, budget: Budget, teacher: nn.Module | None) -> nn.Module:
    return convert_layers(teacher or architecture.build(), architecture.layer_names, config(budget))


METHOD = Method("converted", "MID-L converted", _build, teacher=True, settings=CHOICES)
