"""fit_ffn: the gate and the light values of a MIDFFN, from inputs that its block really had."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from midl.config import num_active_groups
from midl.errors import MIDLError
from midl.layers import MIDFFN
from midl.ops.reference_ffn import activate

__all__ = ["FFNFit", "FFNStart", "fit_ffn"]

_RIDGE = 1e-3
_LEAST_ROWS = 8


class FFNStart(NamedTuple):
    """What a MIDFFN starts from; the names are those of its parameters, with what the fit lost and could have lost.

    ``captured`` is the share of the units' energy that the gate's choice takes, on rows that it was not fitted to, and
    ``oracle`` that of the best choice; ``error`` the mean square of the change in the block's output on those rows,
    relative to the output's variance.
    """

    light_down: Tensor
    light_up: Tensor
    light_hidden: Tensor
    light_bias: Tensor
    gate_weight: Tensor
    gate_bias: Tensor
    captured: float
    oracle: float
    error: float

    @torch.no_grad()
    def write(self, ffn: MIDFFN) -> None:
        """Copy the values into ``ffn``."""
        for name in _WRITTEN:
            getattr(ffn, name).copy_(getattr(self, name))


_WRITTEN = ("light_down", "light_up", "light_hidden", "light_bias", "gate_weight", "gate_bias")


def fit_ffn(ffn: MIDFFN, inputs: Tensor) -> FFNStart:
    """Return the start of ``ffn``, at its rank and ``active``, that loses least on real ``inputs``.

    - The gate guesses how much each group of hidden units matters, with a linear map of the ffn's rank: either its
      pre-activations, each weighted with the norm of its column of the down-projection, or the root of its energy; by
      reduced-rank regression, so that the rank goes where these inputs vary. What loses less on a quarter of the rows,
      which is not fitted to, is taken.
    - A unit's light value is its mean over the rows that leave it out.
    - The low-rank map is fitted (ridge regression on the code) to what is still missing from the output.

    >>> ffn = MIDFFN(16, 64, rank=4, interpolation="hard")
    >>> start = fit_ffn(ffn, torch.randn(256, 16))
    >>> start.write(ffn)
    >>> start.captured <= start.oracle
    True

    Args:
        ffn: has the block's dense weights; is not changed.
        inputs: (rows, in_features); those with NaN or Inf are left out.

    Raises:
        MIDLError: fewer than 8 finite rows.

    Source: reduced-rank regression, A. J. Izenman, "Reduced-rank regression for the multivariate linear model" (1975).
    """
    return FFNFit(ffn, inputs).start(ffn.rank, ffn.active)


class FFNFit:
    """What :func:`fit_ffn` needs to know of one block, for starts at any rank and ``active``."""

    @torch.no_grad()
    def __init__(self, ffn: MIDFFN, inputs: Tensor) -> None:
        rows = inputs.reshape(-1, ffn.in_features)
        finite = rows.isfinite().all(-1)
        self.rows = rows[finite].to(ffn.weight.device, torch.float32)
        self.dropped = len(rows) - len(self.rows)
        if len(self.rows) < _LEAST_ROWS:
            raise MIDLError(f"fit_ffn: inputs has {len(self.rows)} finite rows, expected at least {_LEAST_ROWS}")
        self.groups, self.project = ffn.num_groups, ffn.down_weight.float()
        self.held_out = torch.arange(len(self.rows), device=self.rows.device) % 4 == 0
        before, self.hidden = _hidden(ffn, self.rows)
        norms = self.project.norm(dim=0)
        self.energy = (self.hidden * norms).square().unflatten(-1, (self.groups, -1)).sum(-1)
        fitted = ~self.held_out
        targets = ((before * norms).unflatten(-1, (self.groups, -1)).mean(-1), self.energy.sqrt())
        self.gates = [_Regression(self.rows[fitted], target[fitted]) for target in targets]

    @torch.no_grad()
    def start(self, rank: int, active: float) -> FFNStart:
        """Return the start at ``rank`` and ``active``."""
        k = num_active_groups(active, self.groups)
        starts = [self._fit_light(*gate.reduced(rank), k) for gate in self.gates]
        return min(starts, key=lambda start: start.error)

    def _fit_light(self, down: Tensor, gate_weight: Tensor, gate_bias: Tensor, k: int) -> FFNStart:
        """Return the start for a given code and gate; errors are those on the held-out rows."""
        held_out, fitted, hidden, project = self.held_out, ~self.held_out, self.hidden, self.project
        code = self.rows @ down.T.float()
        chosen = _largest(code @ gate_weight.T.float() + gate_bias.float(), k)
        left_out = ~chosen.repeat_interleave(hidden.shape[-1] // self.groups, dim=-1)
        count = left_out[fitted].sum(0)
        means = (hidden * left_out)[fitted].sum(0) / count.clamp(min=1)
        light_hidden = torch.where(count > 0, means, hidden[fitted].mean(0))
        missing = ((hidden - light_hidden) * left_out) @ project.T
        share = 1 - k / self.groups
        light_up = torch.zeros(project.shape[0], code.shape[1], dtype=torch.float64, device=code.device)
        if share > 0:
            z = code[fitted].double()
            gram = z.T @ z / len(z)
            gram.diagonal().add_(_RIDGE)
            light_up = torch.linalg.solve(gram, z.T @ missing[fitted].double() / len(z)).T / share
        wrong = (missing - share * code @ light_up.T.float())[held_out]
        output = hidden[held_out] @ project.T
        energy = self.energy[held_out]
        total = energy.sum().clamp(min=1e-30)
        return FFNStart(
            down, light_up, light_hidden, project @ light_hidden, gate_weight, gate_bias,
            float((energy * chosen[held_out]).sum() / total), float((energy * _largest(energy, k)).sum() / total),
            float(wrong.square().mean() / (output - output.mean(0)).square().mean().clamp(min=1e-30)),
        )  # fmt: skip


def _hidden(ffn: MIDFFN, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return pre-activations and hidden units, (rows, m)."""

    def linear(weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(rows, weight.float(), None if bias is None else bias.float())

    before = linear(ffn.weight, ffn.bias)
    hidden = activate(before, ffn.activation)
    if ffn.value_weight is not None:
        hidden = hidden * linear(ffn.value_weight, ffn.value_bias)
    return before, hidden


def _largest(scores: Tensor, k: int) -> Tensor:
    """Return the mask of the ``k`` largest scores of each row, and of those that equal the k-th."""
    return scores >= scores.kthvalue(scores.shape[-1] - k + 1, dim=-1, keepdim=True).values


class _Regression:
    """The affine maps of low rank that guess ``target`` (rows, N) best from ``x`` (rows, d)."""

    def __init__(self, x: Tensor, target: Tensor) -> None:
        x, target = x.double(), target.double()
        self.mean, self.target_mean = x.mean(0), target.mean(0)
        x, target = x - self.mean, target - self.target_mean
        covariance = x.T @ x / len(x)
        covariance.diagonal().add_(_RIDGE * covariance.diagonal().mean() + 1e-30)
        root = torch.linalg.cholesky(covariance)
        whitened = torch.linalg.solve_triangular(root, x.T @ target / len(x), upper=False)
        directions = torch.linalg.eigh(whitened @ whitened.T).eigenvectors.flip(-1)
        self.down = torch.linalg.solve_triangular(root.T, directions, upper=True).T
        self.up = whitened.T @ directions

    def reduced(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return down (rank, d), up (N, rank) and offset (N); the code has variance one in every direction."""
        down, up = self.down[:rank], self.up[:, :rank]
        return down, up, self.target_mean - up @ (down @ self.mean)
