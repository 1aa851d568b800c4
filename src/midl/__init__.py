"""midl: layers that spend full computation only on the neurons an input needs (MID-L, arXiv 2505.11416)."""

from midl.adaptation import adapt
from midl.analysis import count_flops, record_activity
from midl.budget import set_active
from midl.config import MIDConfig
from midl.conversion import ConversionReport, convert_, revert_
from midl.layers import MIDFFN, MIDConv2d, MIDLinear
from midl.ops import kernels
from midl.serialization import load_, save

__version__ = "0.1.0"
__all__ = [
    "MIDFFN",
    "ConversionReport",
    "MIDConfig",
    "MIDConv2d",
    "MIDLinear",
    "adapt",
    "convert_",
    "count_flops",
    "kernels",
    "load_",
    "record_activity",
    "revert_",
    "save",
    "set_active",
]
