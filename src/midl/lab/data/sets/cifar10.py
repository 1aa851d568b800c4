"""cifar10: 60,000 photographs of 10 kinds of things, 32 x 32 pixels in colour, the official split.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. No licence is stated.
"""

from __future__ import annotations

from midl.lab.data.augment import crop_and_flip
from midl.lab.data.hub import from_hub
from midl.lab.data.images import decode_images
from midl.lab.data.registry import Spec

__all__ = ["SPEC"]

SPEC = Spec(
    num_classes=10,
    decode=decode_images("img", "label", num_classes=10, mode="RGB", height=32, width=32),
    columns=("img", "label"),
    download=from_hub("uoft-cs/cifar10"),
    origin="the hub data set uoft-cs/cifar10",
    augment=crop_and_flip,
)
