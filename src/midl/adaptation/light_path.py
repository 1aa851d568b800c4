"""The light path that loses least on real inputs: a low-rank map fitted to the layer's outputs, not to its weight."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["LightPath", "fit_light_path", "middle_rank"]


class LightPath(NamedTuple):
    """Factors of a light path, l = up @ (down @ x): ``down`` (r, fan-in), ``up`` (n, r), float64.

    ``reader`` (r, n) gives the same code from the full path's output, down @ x = reader @ f.
    """

    down: Tensor
    up: Tensor
    reader: Tensor


def fit_light_path(weight: Tensor, directions: Tensor, energies: Tensor, rank: int) -> LightPath:
    """Return the rank-``rank`` map that minimises E||W x - up down x||^2 over the inputs that were calibrated on.

    The minimum projects the output on its ``rank`` directions of largest energy, the same as the truncated SVD of
    W C^(1/2) with C = E[x x^T]; no matrix is inverted, so few or degenerate inputs do no harm. The energies are
    split evenly between the two factors, as :func:`midl.layers.lowrank.truncated_svd` does with singular values.

    Args:
        weight: (n, fan-in).
        directions: (n, m) from :meth:`Moments.principal_outputs`.
        energies: (m,) likewise, descending.
        rank: at most m.

    Source: the whitening of SVD-LLM (arXiv 2403.07378) and ASVD (arXiv 2312.05821), written in the output space.
    """
    chosen = directions[:, :rank].double()
    # The root of the output's standard deviation; a direction that never occurs keeps its own scale.
    scale = energies[:rank].double() ** 0.25
    scale = scale.where(scale > 1e-6 * scale.max().clamp(min=1e-30), 1.0)
    reader = chosen.T / scale[:, None]
    return LightPath(reader @ weight.double(), chosen * scale, reader)


def middle_rank(weight: Tensor) -> int:
    """Return a rank in the middle of what is worth trying: a tenth of the layer's multiply-adds."""
    n, fan_in = weight.shape
    return max(1, int(0.1 * n * fan_in / (n + fan_in)))
