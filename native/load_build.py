"""pytest plugin: test the extension built at ``MIDL_NATIVE_BUILD`` instead of the installed one (sanitizer builds)."""

import importlib.util
import os
import sys

# The kernels share the OpenMP runtime that torch loads.
import torch  # noqa: F401

_spec = importlib.util.spec_from_file_location("midl._native", os.environ["MIDL_NATIVE_BUILD"])
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
sys.modules["midl._native"] = _module
