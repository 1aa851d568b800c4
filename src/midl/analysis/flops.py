"""count_flops: the FLOPs of a forward pass, through torch's FlopCounterMode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from midl.errors import MIDLError

__all__ = ["count_flops", "evaluation_mode"]


def count_flops(model: nn.Module, inputs: Any) -> int:
    """Return the FLOPs of one evaluation-mode forward pass of ``model`` on ``inputs``, two per multiply-add.

    Counted are the products that torch's FlopCounterMode knows (matmul, convolution, attention) and midl's ops, so
    models that mix MID-L layers with others come out right. Divide by the batch size for FLOPs per input. Layers with a
    threshold count as if every input took as many groups as it may: an upper bound (:func:`midl.record_activity` tells
    how many they take).

    >>> count_flops(nn.Linear(64, 128), torch.zeros(1, 64))
    16384

    Args:
        model: left as it was, its training flags included.
        inputs: a tensor, a tuple or list of arguments, or a dict of keyword arguments.

    Raises:
        MIDLError: the model is a compiled one, whose kernels are not counted.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports triton where it is installed

    if any(type(m).__name__ == "OptimizedModule" for m in model.modules()):
        raise MIDLError("count_flops: model is compiled, expected the eager model (pass model._orig_mod)")
    # On a CPU torch's fused attention is an op that FlopCounterMode does not know; the plain one is made of matmuls.
    with (
        evaluation_mode(model),
        sdpa_kernel(SDPBackend.MATH),
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
    ):
        if isinstance(inputs, Mapping):
            model(**inputs)
        elif isinstance(inputs, (tuple, list)):
            model(*inputs)
        else:
            model(inputs)
    return int(counter.get_total_flops())


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluate ``model``, without torch's fused transformer kernels, which FlopCounterMode does not see into."""
    training = [m for m in model.modules() if m.training]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module in training:
            module.training = True
