"""set_active: the budget of a whole model."""

from __future__ import annotations

from torch import nn

from midl.config import check_active
from midl.errors import MIDLError
from midl.layers import MIDLayer

__all__ = ["set_active"]


def set_active(model: nn.Module, active: float) -> None:
    """Set the fraction of active groups of every MID-L layer in ``model``; the weights stay.

    >>> from midl import MIDLinear
    >>> layer = MIDLinear(64, 128)
    >>> set_active(layer, 0.3)
    >>> layer.num_selected
    38

    Args:
        model: contains, or is, a MID-L layer.
        active: in (0, 1].

    Raises:
        MIDLError: ``active`` out of range, or a model without MID-L layers.
    """
    check_active("set_active", active)
    layers = [m for m in model.modules() if isinstance(m, MIDLayer)]
    if not layers:
        raise MIDLError(f"set_active: the {type(model).__name__} has no MID-L layers")
    for layer in layers:
        layer.active = active
