"""Distillation: a converted model learns to give its teacher's answers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from midl.adaptation import soft_cross_entropy
from midl.lab.training import Loss

__all__ = ["distillation_loss"]


def distillation_loss(teacher: nn.Module, temperature: float = 2.0) -> Loss:
    """Return the loss KL(teacher || student) of the softened outputs, scaled by the squared temperature.

    Labels are not used. ``teacher`` should be in evaluation mode.

    >>> teacher = nn.Linear(4, 3).eval()
    >>> x = torch.randn(5, 4)
    >>> round(abs(distillation_loss(teacher)(x, teacher(x), torch.zeros(5)).item()), 5)
    0.0
    """

    divergence = soft_cross_entropy(temperature)

    def loss(inputs: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher.to(inputs.device)(inputs)
        return divergence(logits, target)

    return loss
