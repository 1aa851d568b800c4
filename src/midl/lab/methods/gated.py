"""gated: the trained dense network through ``midl.adapt``, then taught the dense network's answers.

``adapted``, but no layer becomes its light path alone: each that is not left dense has a gate and a full path.
"""

from __future__ import annotations

from midl.lab.methods import adapted

__all__ = ["METHOD"]

METHOD = adapted.method("gated", "MID-L gated", light_alone=False)
