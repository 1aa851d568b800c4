"""The low-rank start of the light path: a truncated SVD of the full weight."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["truncated_svd"]

# The cost of an exact SVD grows with the cube of the size; above this the randomised one is used, whose test says how
# close to the best fit it comes.
_EXACT_LIMIT = 1024


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return ``(down, up)``, (rank, d) and (n, rank), with ``up @ down`` the best rank-``rank`` fit of ``weight``.

    The singular values are split evenly between the two factors. Weights whose smaller side exceeds 1024 use a
    randomised SVD with a fixed seed, which leaves torch's random state as it was.

    >>> down, up = truncated_svd(torch.eye(4), 4)
    >>> torch.allclose(up @ down, torch.eye(4), atol=1e-6)
    True

    Args:
        weight: (n, d), any floating dtype; computed in float32 or float64.
        rank: at most min(n, d).
    """
    work = weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    if min(work.shape) <= _EXACT_LIMIT or rank > min(work.shape) // 2:
        u, s, vh = torch.linalg.svd(work, full_matrices=False)
    else:
        devices = [work.device] if work.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(work, q=min(rank + 16, *work.shape), niter=4)
        vh = v.T
    root = s[:rank].sqrt()
    down, up = root[:, None] * vh[:rank], u[:, :rank] * root
    return down.to(weight.dtype), up.to(weight.dtype)
