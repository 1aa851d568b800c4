"""refresh_normalization: batch normalisation that knows what the converted layers put out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from midl.adaptation.batches import run, size_of
from midl.adaptation.measure import output_error
from midl.analysis.flops import evaluation_mode

__all__ = ["refresh_normalization"]


@torch.no_grad()
def refresh_normalization(
    model: nn.Module, batches: Sequence[Any], measured: Sequence[Any] = (), expected: Sequence[Tensor] = ()
) -> bool:
    """Take the running statistics of batch normalisations anew; keep them if the output comes nearer to ``expected``.

    A neuron varies less on the light path than in the dense layer, so the dense model's statistics do not fit, nor do
    those of one budget another: call this after :func:`midl.set_active` too. Returns whether the new ones were kept.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).eval()
    >>> x = torch.randn(256, 8)
    >>> wanted = nn.functional.batch_norm(model[0](x), None, None, training=True)
    >>> refresh_normalization(model, [x], [x], [wanted])
    True

    Args:
        model: changed in place.
        batches: inputs to take the statistics from; a batch of a single input has none and is left out.
        measured: inputs to judge by; none: the new statistics are kept whatever they do.
        expected: the outputs wanted for them.

    Source: the adaptive batch normalisation of B. Li et al., "EagleEye", arXiv 2007.02491.
    """
    found = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    batches = [batch for batch in batches if size_of(batch) > 1]
    if not found or not batches:
        return False
    before = [{name: buffer.clone() for name, buffer in m.named_buffers()} for m in found]
    momenta, modes = [m.momentum for m in found], [m.training for m in found]
    error = output_error(model, measured, expected) if measured else math.inf
    try:
        with evaluation_mode(model):
            for m in found:
                m.reset_running_stats()
                m.momentum = None  # the mean over all batches
                m.train()
            for batch in batches:
                run(model, batch)
    except BaseException:
        _put_back(found, before)
        raise
    finally:
        for m, momentum, training, buffers in zip(found, momenta, modes, before, strict=True):
            m.momentum = momentum
            m.train(training)
            if m.num_batches_tracked is not None:
                m.num_batches_tracked.copy_(buffers["num_batches_tracked"])
    # Written so that NaN is no improvement.
    if not measured or output_error(model, measured, expected) < error:
        return True
    _put_back(found, before)
    return False


def _put_back(modules: Sequence[nn.Module], before: Sequence[dict[str, Tensor]]) -> None:
    for module, buffers in zip(modules, before, strict=True):
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])
