"""initialise: light path and gate of one layer, from what the layer did on real inputs."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from midl.adaptation.calibrate import Principal
from midl.adaptation.gate import captured_energy, fit_gate
from midl.adaptation.light_path import LightPath, fit_light_path
from midl.adaptation.sensitivity import OutputRows
from midl.config import MIDConfig, layer_macs, num_active_groups
from midl.errors import MIDLError
from midl.layers import MIDLayer

__all__ = ["Start", "initialise", "light_alone"]


@dataclasses.dataclass(frozen=True)
class Start:
    """Light path and gate that a converted layer starts from.

    Attributes:
        light_path: the factors.
        gate: ``"projection"`` or ``"light"``, whichever lost less energy on the rows the gate was not fitted to.
        gate_weight: (N, r); for the light gate the group means of ``light_path.up``, which rank alike.
        gate_bias: (N,).
        group_size: neurons per group.
        light_macs: multiply-adds per row of code, light path and gate.
        held_out_scores: (rows, N) gate logits of rows that the gate was not fitted to.
        held_out_energy: (rows, N) what each group of those rows loses on the light path.
    """

    light_path: LightPath
    gate: Literal["projection", "light"]
    gate_weight: Tensor
    gate_bias: Tensor
    group_size: int
    light_macs: int
    held_out_scores: Tensor
    held_out_energy: Tensor

    @property
    def rank(self) -> int:
        """Width of the code."""
        return self.light_path.up.shape[1]

    def captured(self, active: float) -> tuple[float, float]:
        """Return the share of the held-out energy in the selected groups: by the gate, and by the best choice."""
        if not active:
            return 0.0, 0.0
        k = num_active_groups(active, self.held_out_energy.shape[1])
        return (
            captured_energy(self.held_out_scores, self.held_out_energy, k),
            captured_energy(self.held_out_energy, self.held_out_energy, k),
        )

    def lost(self, active: float) -> float:
        """Return the energy per held-out row in the groups that the gate leaves on the light path."""
        total = float(self.held_out_energy.sum(-1).mean())
        return total * (1 - self.captured(active)[0])

    def config(self, active: float) -> MIDConfig:
        """Return the configuration of a layer that starts here; a selected neuron has its dense value."""
        return MIDConfig(
            active=active, rank=self.rank, group_size=self.group_size, gate=self.gate, interpolation="hard"
        )

    @torch.no_grad()
    def write(self, layer: MIDLayer) -> None:
        """Set the light path and gate of ``layer``, made with :meth:`config`."""
        layer.light_down.copy_(self.light_path.down.view_as(layer.light_down))
        layer.light_up.copy_(self.light_path.up)
        if layer.gate_weight is not None and layer.gate_bias is not None:
            layer.gate_weight.copy_(self.gate_weight)
            layer.gate_bias.copy_(self.gate_bias)


def initialise(
    weight: Tensor,
    bias: Tensor | None,
    principal: Principal,
    rows: OutputRows,
    *,
    group_size: int,
    light_macs: int,
    active: float = 0.45,
    compare_rows: bool = False,
) -> Start:
    """Return the start of a layer whose code, light path and gate cost at most ``light_macs`` per row.

    Two gates are tried at the same cost: the projection gate, fitted to the energy that each group loses on the light
    path, and the light gate, which has no weights and so leaves more rank. A quarter of ``rows`` decides.

    Args:
        weight: (n, fan-in) of the dense layer.
        bias: (n,) or None.
        principal: from :meth:`Moments.principal_outputs`.
        rows: from :func:`sample_outputs`.
        group_size: divides n.
        light_macs: at least one rank's worth.
        active: fraction of groups at which the two gates are compared.
        compare_rows: as for :func:`fit_gate`.

    Raises:
        MIDLError: ``light_macs`` does not pay for rank 1, or too few rows to fit a gate.
    """
    if len(rows.full) < 8:
        raise MIDLError(f"initialise: {len(rows.full)} finite rows, expected at least 8")
    starts = []
    for gate in ("light", "projection"):
        rank = _rank_for(weight, gate, group_size, light_macs)
        if rank >= 1:
            starts.append(_start(weight, bias, principal, rows, gate, rank, group_size, compare_rows))
    if not starts:
        raise MIDLError(f"initialise: light_macs={light_macs}, expected at least {sum(weight.shape)} (rank 1)")
    return min(starts, key=lambda start: start.lost(active))


def light_alone(
    weight: Tensor, bias: Tensor | None, principal: Principal, rows: OutputRows, *, group_size: int,
    light_macs: int, multiple: int = 1,
) -> Start | None:  # fmt: skip
    """Return the start of a layer that is its light path alone (``active=0``); None where rank 1 costs too much.

    The arguments are those of :func:`initialise`, and ``multiple``: ranks of at least twice as much are rounded down to
    multiples of it.
    """
    rank = _rank_for(weight, "light", group_size, light_macs)
    if not rank:
        return None
    rank = rank if rank < 2 * multiple else rank - rank % multiple
    return _start(weight, bias, principal, rows, "light", rank, group_size, compare_rows=False)


def _rank_for(weight: Tensor, gate: Literal["projection", "light"], group_size: int, light_macs: int) -> int:
    n, fan_in = weight.shape
    per_rank = layer_macs(fan_in, n, 1, num_selected=0, group_size=group_size, gate=gate)
    return min(light_macs // per_rank, n, fan_in)


def _start(
    weight: Tensor,
    bias: Tensor | None,
    principal: Principal,
    rows: OutputRows,
    gate: Literal["projection", "light"],
    rank: int,
    group_size: int,
    compare_rows: bool,
) -> Start:
    n, fan_in = weight.shape
    path = fit_light_path(weight, principal, rank)
    code = rows.full @ path.reader.T.float()
    energy = rows.energy(code @ path.up.T.float(), group_size)
    fitting = torch.arange(len(code), device=code.device) % 4 != 0
    if gate == "projection":
        gate_weight, gate_bias = fit_gate(code[fitting], energy[fitting], compare_rows=compare_rows)
    else:
        gate_weight = path.up.unflatten(0, (-1, group_size)).mean(1)
        offset = torch.zeros(n, device=weight.device) if bias is None else bias.detach()
        gate_bias = offset.double().view(-1, group_size).mean(1)
    scores = code[~fitting] @ gate_weight.T.float() + gate_bias.float()
    macs = layer_macs(fan_in, n, rank, num_selected=0, group_size=group_size, gate=gate)
    return Start(path, gate, gate_weight, gate_bias, group_size, macs, scores, energy[~fitting])
