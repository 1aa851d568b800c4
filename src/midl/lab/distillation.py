"""Distillation: a converted model learns to give its teacher's answers, and some labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from midl.adaptation import soft_cross_entropy
from midl.lab.training import Loss, cross_entropy

__all__ = ["distillation_loss"]


def distillation_loss(
    teacher: nn.Module, temperature: float = 2.0, *, kd_ratio: float = 1.0, label_smoothing: float = 0.0
) -> Loss:
    """Return the loss KL(teacher || student) of the softened outputs, scaled by the squared temperature.

    With ``kd_ratio`` below 1 it has this share, and the cross-entropy with the labels the rest. ``teacher`` should be
    in evaluation mode.

    >>> teacher = nn.Linear(4, 3).eval()
    >>> x = torch.randn(5, 4)
    >>> round(abs(distillation_loss(teacher)(x, teacher(x), torch.zeros(5)).item()), 5)
    0.0
    """

    divergence, hard = soft_cross_entropy(temperature), cross_entropy(label_smoothing)

    def loss(inputs: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher.to(inputs.device)(inputs).float()
        value = divergence(logits, target)
        return value if kd_ratio == 1 else kd_ratio * value + (1 - kd_ratio) * hard(inputs, logits, labels)

    return loss
