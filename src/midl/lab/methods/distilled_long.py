"""distilled_long: ``distilled`` for as long as ``gated_long``, at the same learning rates: its dense counterpart."""

from __future__ import annotations

import dataclasses

from midl.lab.methods import distilled

__all__ = ["METHOD"]

METHOD = dataclasses.replace(distilled.METHOD, name="distilled_long", title="dense distilled, long", long=True)
