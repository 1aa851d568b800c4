"""The layers: MIDLinear and MIDConv2d."""

from midl.layers.base import MIDLayer
from midl.layers.conv import MIDConv2d
from midl.layers.linear import MIDLinear

__all__ = ["MIDConv2d", "MIDLayer", "MIDLinear"]
