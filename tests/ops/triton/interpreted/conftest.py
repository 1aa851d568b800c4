"""Tests that run the Triton kernels in Triton's interpreter; collected only under TRITON_INTERPRET=1.

The switch changes the process for good, so tests/ops/triton/test_interpreter.py starts one for these.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def _exact_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repair Triton 3.9's interpreter: it truncates to bfloat16 where a GPU rounds, and multiplies bit patterns."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    import midl.ops.triton as implementation

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widen(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return TensorHandle(wide, tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        return dot(self, widen(a), widen(b), *args)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32:
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
            return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        return cast(self, src, dst_type)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
    for name in ("create_fp_trunc", "create_fp_ext"):
        monkeypatch.setattr(InterpreterBuilder, name, lambda self, src, dst_type: self.cast_impl(src, dst_type))
    monkeypatch.setattr(implementation, "_interpreter_multiplies_bfloat16", lambda: True)
