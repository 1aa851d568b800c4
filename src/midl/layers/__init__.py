"""The layers: MIDLinear, MIDConv2d and MIDFFN; Factors, what is left of one that never selects."""

from midl.layers.base import MIDLayer
from midl.layers.conv import MIDConv2d
from midl.layers.factors import Factors
from midl.layers.ffn import MIDFFN
from midl.layers.linear import MIDLinear

__all__ = ["MIDFFN", "Factors", "MIDConv2d", "MIDLayer", "MIDLinear"]
