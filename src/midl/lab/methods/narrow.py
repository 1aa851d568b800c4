"""narrow: a dense network with fewer neurons in every layer, as wide as the FLOPs of MID-L from scratch allow."""

from __future__ import annotations

import torch
from torch import nn

from midl.analysis import count_flops
from midl.lab.methods import scratch
from midl.lab.methods.method import Budget, Method
from midl.lab.models import Architecture

__all__ = ["METHOD"]


def _build(architecture: Architecture, budget: Budget, teacher: nn.Module | None) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # only counted
        flops = count_flops(scratch.METHOD.build(architecture, budget, None), architecture.example())
    return architecture.narrow(flops).build()


METHOD = Method("narrow", "dense narrowed", _build, own_modules=True)
