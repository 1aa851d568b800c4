"""gated_long: ``gated``, taught by the dense network for as long as ``narrow_distilled`` and at its learning rates."""

from __future__ import annotations

import dataclasses

from midl.lab.methods import gated

__all__ = ["METHOD"]

METHOD = dataclasses.replace(gated.METHOD, name="gated_long", title="MID-L gated, long", long=True)
