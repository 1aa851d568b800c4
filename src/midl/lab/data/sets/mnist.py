"""mnist: 70,000 handwritten digits, 28 x 28 grey levels, the official split.

Source: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning applied to document recognition",
Proc. IEEE 1998. Licence as commonly given: CC BY-SA 3.0.
"""

from __future__ import annotations

from midl.lab.data.hub import from_hub
from midl.lab.data.images import decode_images
from midl.lab.data.registry import Spec

__all__ = ["SPEC"]

SPEC = Spec(
    num_classes=10,
    decode=decode_images("image", "label", num_classes=10, mode="L", height=28, width=28),
    columns=("image", "label"),
    download=from_hub("ylecun/mnist"),
    origin="the hub data set ylecun/mnist",
)
