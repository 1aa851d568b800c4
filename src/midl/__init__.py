"""midl: layers that spend full computation only on the neurons an input needs (MID-L, arXiv 2505.11416)."""

from midl.config import MIDConfig
from midl.layers import MIDConv2d, MIDLinear
from midl.ops import kernels

__version__ = "0.1.0"
__all__ = [
    "MIDConfig",
    "MIDConv2d",
    "MIDLinear",
    "kernels",
]
