"""Where the Triton kernels cannot run, they say why; where triton is absent, everything else works."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import midl
from midl.errors import KernelError
from midl.ops.dispatch import unavailable_reason

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # what an import of it would find
import torch, midl
from midl.ops.dispatch import unavailable_reason
print(unavailable_reason("triton"))
y = midl.MIDLinear(8, 16, rank=2)(torch.ones(3, 8))
y.sum().backward()
try:
    midl.kernels("triton")
except midl.errors.KernelError as error:
    print(error)
from midl.analysis.gpu_model import device_named, win_rows
print(len(win_rows(device_named("a100"))))
"""


def test_without_triton_the_error_names_the_extra_and_the_cpu_works() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=True)
    reason, error, rows = done.stdout.splitlines()
    assert reason == "triton is not installed: pip install 'midl[gpu]'"
    assert error.startswith(f"kernels: name='triton' is not available: {reason}")
    assert int(rows) > 0


def test_importing_midl_and_computing_on_a_cpu_does_not_import_triton() -> None:
    code = "import sys, torch, midl; midl.MIDLinear(8, 16, rank=2)(torch.ones(3, 8)); print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_reason_is_that() -> None:
    pytest.importorskip("triton")
    assert unavailable_reason("triton") == "no CUDA device"
    with pytest.raises(KernelError, match="name='triton' is not available: no CUDA device"):
        midl.kernels("triton")
