"""Leaves out the doctests of modules that this machine cannot import or run; their tests skip with the reason."""

import importlib.util

from midl.ops.dispatch import unavailable_reason

collect_ignore = []
if unavailable_reason("native"):
    collect_ignore += ["src/midl/ops/native.py"]
if importlib.util.find_spec("triton") is None:
    collect_ignore += ["src/midl/ops/triton", "src/midl/lab/gpu"]
