"""svhn: 99,289 house-number digits cut out of street photographs, 32 x 32 pixels in colour, the official split.

The 531,131 easier ``extra`` images are not used. Digits are not flipped: that would make other signs of them.

Source: Y. Netzer, T. Wang, A. Coates, A. Bissacco, B. Wu, A. Y. Ng, "Reading Digits in Natural Images with Unsupervised
Feature Learning", NIPS workshop on deep learning 2011. For non-commercial use.
"""

from __future__ import annotations

from midl.lab.data.augment import crop
from midl.lab.data.hub import from_hub
from midl.lab.data.images import decode_images
from midl.lab.data.registry import Spec

__all__ = ["SPEC"]

SPEC = Spec(
    num_classes=10,
    decode=decode_images("image", "label", num_classes=10, mode="RGB", height=32, width=32),
    columns=("image", "label"),
    download=from_hub("ufldl-stanford/svhn", "cropped_digits"),
    origin="the hub data set ufldl-stanford/svhn (cropped_digits)",
    augment=crop,
)
