"""Putting the layers of a plan into the model, and taking them out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from midl.conversion.convert import make_layer, replace_modules

if TYPE_CHECKING:
    from midl.adaptation.blocks import Block
    from midl.adaptation.plan import Choice

__all__ = ["make_replacements", "replaced"]


def make_replacements(
    layers: Mapping[str, nn.Module], blocks: Mapping[str, Block], plan: Mapping[str, Choice]
) -> dict[int, nn.Module]:
    """Return the MID-L layers with their starts that a plan wants, by the ids of the dense modules they replace."""
    replacements: dict[int, nn.Module] = {}
    for name, choice in plan.items():
        if choice.start is None:
            continue
        config = choice.start.config(choice.active)
        layer: Any = blocks[name].sparse(config) if name in blocks else make_layer(layers[name], config)
        choice.start.write(layer)
        replacements.update(blocks[name].replacements(layer) if name in blocks else {id(layers[name]): layer})
    return replacements


@contextmanager
def replaced(model: nn.Module, replacements: Mapping[int, nn.Module]) -> Iterator[None]:
    """Have ``replacements`` (id of a module of ``model`` to the new one) in the model inside the block."""
    originals = {id(module): module for module in model.modules()}
    replace_modules(model, replacements)
    try:
        yield
    finally:
        replace_modules(model, {id(new): originals[old] for old, new in replacements.items()})
