"""The light path that loses least on real inputs: a low-rank map fitted to the layer's outputs, not to its weight."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from midl.adaptation.calibrate import Principal

__all__ = ["LightPath", "fit_light_path", "middle_rank"]


class LightPath(NamedTuple):
    """Factors of a light path, l = up @ (down @ x): ``down`` (r, fan-in), ``up`` (n, r), float64.

    ``reader`` (r, n) gives the same code from the full path's output, down @ x = reader @ f.
    """

    down: Tensor
    up: Tensor
    reader: Tensor


def fit_light_path(weight: Tensor, principal: Principal, rank: int) -> LightPath:
    """Return the rank-``rank`` map that loses least over the inputs that were calibrated on.

    Without a metric that is the minimum of E||W x - up down x||^2: the projection of the output on its ``rank``
    directions of largest energy, the same as the truncated SVD of W C^(1/2) with C = E[x x^T]; no matrix of the
    inputs is inverted, so few or degenerate inputs do no harm. With a metric M it is the minimum of
    E[(W x - up down x)^T M (W x - up down x)], the truncated SVD of M^(1/2) W C^(1/2). The energies are split
    evenly between the two factors, as :func:`midl.layers.lowrank.truncated_svd` does with singular values.

    Args:
        weight: (n, fan-in).
        principal: from :meth:`Moments.principal_outputs`.
        rank: at most m.

    Source: the whitening of SVD-LLM (arXiv 2403.07378) and ASVD (arXiv 2312.05821), written in the output space; the
    metric is the output side of the Fisher weighting of FWSVD (arXiv 2207.00112), with its off-diagonal part.
    """
    chosen, readers = principal.directions[:, :rank].double(), principal.readers[:rank].double()
    # The root of the output's standard deviation; a direction that never occurs keeps its own scale.
    scale = principal.energies[:rank].double() ** 0.25
    scale = scale.where(scale > 1e-6 * scale.max().clamp(min=1e-30), 1.0)
    reader = readers / scale[:, None]
    return LightPath(reader @ weight.double(), chosen * scale, reader)


def middle_rank(weight: Tensor) -> int:
    """Return a rank in the middle of what is worth trying: a tenth of the layer's multiply-adds."""
    n, fan_in = weight.shape
    return max(1, int(0.1 * n * fan_in / (n + fan_in)))
