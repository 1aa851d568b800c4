"""fit_gate: a linear gate on the low-rank code that predicts which groups matter."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["captured_energy", "fit_gate"]


def fit_gate(code: Tensor, energy: Tensor, ridge: float = 0.01, *, compare_rows: bool = False) -> tuple[Tensor, Tensor]:
    """Return ``(gate_weight, gate_bias)``, (N, r) and (N,), whose logits rank the groups by their expected energy.

    Ridge regression, in closed form, of the root of each row's energies (scaled to a sum of one, since only the
    ranking within a row counts; the root keeps single large energies from ruling the fit) on the code.

    >>> code = torch.randn(200, 2)
    >>> energy = torch.stack([code[:, 0].clamp(min=0), code[:, 1].clamp(min=0)], dim=1) ** 2
    >>> weight, bias = fit_gate(code, energy)
    >>> bool(weight[0, 0] > weight[0, 1].abs())
    True

    Args:
        code: (rows, r).
        energy: (rows, N), at least 0.
        ridge: strength of the regularisation, relative to the code's variance.
        compare_rows: whether logits of different rows are to compare, as thresholds need: energies then keep their
            size.
    """
    z = code.double()
    mean, scale = z.mean(0), z.std(0, correction=0)
    scale = scale.where(scale > 0, 1.0)
    z = (z - mean) / scale
    share = energy.double()
    total = share.sum(-1, keepdim=True)
    share = (share / (total.mean() if compare_rows else total).clamp(min=1e-300)).sqrt()
    gram = z.T @ z / len(z) + ridge * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    weight = torch.linalg.solve(gram, z.T @ (share - share.mean(0)) / len(z)).T / scale
    return weight, share.mean(0) - weight @ mean


def captured_energy(scores: Tensor, energy: Tensor, k: int) -> float:
    """Return the share of ``energy`` (rows, N) in the ``k`` groups of largest ``scores`` (rows, N) of every row.

    >>> captured_energy(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 3.0]]), k=1)
    0.75
    """
    total = float(energy.sum())
    chosen = energy.gather(-1, scores.topk(k, dim=-1).indices)
    return float(chosen.sum()) / total if total > 0 else 1.0
