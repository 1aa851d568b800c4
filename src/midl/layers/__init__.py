"""The layers: MIDLinear, MIDConv2d and MIDFFN."""

from midl.layers.base import MIDLayer
from midl.layers.conv import MIDConv2d
from midl.layers.ffn import MIDFFN
from midl.layers.linear import MIDLinear

__all__ = ["MIDFFN", "MIDConv2d", "MIDLayer", "MIDLinear"]
