"""k_winners: Top-k without a light path; what MID-L spends on the light path pays for more winners here.

A low-rank code gives the gate's logits, as in MID-L from scratch and at the same rank; the neurons of the winning
groups are computed, the others give the bias alone.
"""

from __future__ import annotations

from torch import nn

from midl.adaptation.calibrate import weight_of
from midl.analysis import count_flops
from midl.config import MIDConfig, auto_rank, layer_macs, num_active_groups
from midl.conversion import convert_
from midl.errors import MIDLError
from midl.lab.measure import layer_flops
from midl.lab.methods import scratch
from midl.lab.methods.method import Budget, Method
from midl.lab.models import Architecture
from midl.layers import MIDLayer

__all__ = ["METHOD"]


def _build(architecture: Architecture, budget: Budget, teacher: nn.Module | None) -> nn.Module:
    model = architecture.build()
    overrides = {name: _config(model.get_submodule(name), budget) for name in architecture.layer_names}
    convert_(model, filter_fn=lambda module, name: name in overrides, overrides=overrides)
    for layer in model.modules():
        if isinstance(layer, MIDLayer):
            nn.init.zeros_(layer.light_up.requires_grad_(False))
    return model


def _config(dense: nn.Module, budget: Budget) -> MIDConfig:
    """Return the configuration with as many winners as the budget allows when the light path costs nothing."""
    n, fan_in = weight_of(dense).shape
    config = scratch.config(budget)
    size, groups = budget.group_size, n // budget.group_size
    rank = auto_rank(
        fan_in, n, active=budget.active, group_size=size, gate=config.gate, flops_ratio=budget.flops_ratio,
        owner="k_winners",
    )  # fmt: skip
    macs = layer_macs(fan_in, n, rank, num_selected=0, group_size=size, gate=config.gate) - rank * n
    winners = min(groups, int((n * fan_in / budget.flops_ratio - macs) / (size * fan_in)))
    if num_active_groups(winners / groups, groups) != winners:
        raise MIDLError(f"k_winners: {winners} of {groups} groups cannot be expressed as a fraction")
    return config.replace(rank=rank, active=winners / groups)


def _flops(model: nn.Module, architecture: Architecture) -> int:
    """Return the FLOPs without the light path, whose zeros need not be multiplied."""
    example = architecture.example()
    names = [name for name in architecture.layer_names if isinstance(model.get_submodule(name), MIDLayer)]
    flops = count_flops(model, example)
    for name, spent in layer_flops(model, example, names).items():
        layer = model.get_submodule(name)
        assert isinstance(layer, MIDLayer)
        n, fan_in = layer.weight.flatten(1).shape
        macs = layer_macs(
            fan_in, n, layer.rank, num_selected=layer.num_selected, group_size=layer.config.group_size,
            gate=layer.config.gate,
        )  # fmt: skip
        flops -= spent * layer.rank * n // macs
    return flops


METHOD = Method("k_winners", "k winners", _build, flops=_flops)
