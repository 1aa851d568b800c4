"""adapted: the trained dense network through ``midl.adapt``, then taught the dense network's answers.

What ``converted`` does with the weights alone this does with inputs: light paths and gates fitted to them, and each
layer the density and rank that lose least, which may be a light path alone or no change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from midl.adaptation import adapt
from midl.lab.methods.method import NETWORK_RATIO, Budget, Method
from midl.lab.models import Architecture

__all__ = ["METHOD", "method"]

# What the paper claims to do with; where layers stay dense the budget of FLOPs alone would keep more.
_MAX_ACTIVE = 0.45


def _build(architecture: Architecture, budget: Budget, teacher: nn.Module | None) -> nn.Module:
    return teacher or architecture.build()


def method(name: str, title: str, **choices: Any) -> Method:
    """Return the method that adapts the dense network, with further arguments of ``midl.adapt``."""
    choices = {"samples": 2048, "seed": 0, "max_active": _MAX_ACTIVE, **choices}

    def fit(model: nn.Module, architecture: Architecture, budget: Budget, batches: Sequence[Tensor]) -> None:
        names = architecture.layer_names
        adapt(
            model, batches, NETWORK_RATIO, group_size=budget.group_size,
            filter_fn=lambda module, name: name in names, **choices,
        )  # fmt: skip

    return Method(name, title, _build, teacher=True, fit=fit, settings={**choices, "version": 1})


METHOD = method("adapted", "MID-L adapted")
