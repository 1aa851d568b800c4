"""mnist: 70,000 handwritten digits, 28 x 28 grey levels, the official split.

Source: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning applied to document recognition",
Proc. IEEE 1998. Licence as commonly given: CC BY-SA 3.0.
"""

from __future__ import annotations

from collections.abc import Mapping

from midl.lab.data.dataset import Arrays
from midl.lab.data.hub import from_hub
from midl.lab.data.registry import Spec
from midl.lab.data.statistics import channel_statistics
from midl.lab.data.table import Table

__all__ = ["SPEC"]

_CLASSES = 10


def _decode(tables: Mapping[str, Table]) -> Arrays:
    train, test = tables["train"], tables["test"]
    train_x = train.images("image", "L", 28, 28)
    return Arrays(
        train_x,
        train.labels("label", _CLASSES),
        test.images("image", "L", 28, 28),
        test.labels("label", _CLASSES),
        *channel_statistics(train_x),
    )


SPEC = Spec(
    num_classes=_CLASSES,
    decode=_decode,
    columns=("image", "label"),
    download=from_hub("ylecun/mnist"),
    origin="the hub data set ylecun/mnist",
)
