"""Serve with less memory and fewer steps: packed weights, the light path alone, no batch normalisation, no ReLU."""

from midl.serving.batch_norm import fuse_batch_norm_
from midl.serving.packing import (
    PackedMIDConv2d,
    PackedMIDFFN,
    PackedMIDLinear,
    PackedReLU,
    PackedSequential,
    factor_,
    fuse_relu_,
    pack_,
    unpack_,
)

__all__ = [
    "PackedMIDConv2d",
    "PackedMIDFFN",
    "PackedMIDLinear",
    "PackedReLU",
    "PackedSequential",
    "factor_",
    "fuse_batch_norm_",
    "fuse_relu_",
    "pack_",
    "unpack_",
]
