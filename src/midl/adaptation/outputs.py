"""Layer outputs as rows of neurons, and the hooks that read or replace them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["from_rows", "hooked", "to_rows"]

Hook = Callable[[Tensor], Tensor | None]


def to_rows(layer: nn.Module, output: Tensor) -> Tensor:
    """Return a layer's output as (rows, neurons): one row per input of a linear layer, per position of an image."""
    if isinstance(layer, nn.Conv2d):
        output = output.movedim(-3, -1)
    return output.reshape(-1, output.shape[-1])


def from_rows(layer: nn.Module, rows: Tensor, like: Tensor) -> Tensor:
    """Inverse of :func:`to_rows` for an output of the shape of ``like``."""
    if isinstance(layer, nn.Conv2d):
        return rows.reshape(like.movedim(-3, -1).shape).movedim(-1, -3)
    return rows.reshape(like.shape)


@contextmanager
def hooked(layers: Mapping[str, nn.Module], hook: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Call ``hook(name, output)`` on the output of every layer inside the block; what it returns replaces the output.

    The hooks are gone afterwards, whatever happens in the block.
    """

    def call(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        return lambda module, args, output: hook(name, output)

    handles = [layer.register_forward_hook(call(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
