"""``import midl`` stays light: no optional package, no GPU, no thread or warning of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

HEAVY = [
    "triton", "datasets", "matplotlib", "safetensors", "typer", "rich", "transformers", "sklearn", "pandas", "PIL",
    "torch._dynamo", "torch._inductor",
]  # fmt: skip

PROGRAM = """
import json, os, sys, threading
import torch
def state():
    return {
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads(), threading.active_count()],
        "environment": dict(os.environ),
        "random": torch.get_rng_state().sum().item(),
        "dtype": str(torch.get_default_dtype()),
        "cuda": torch.cuda.is_initialized(),
    }
before, modules = state(), set(sys.modules)
import midl
print(json.dumps({"before": before, "after": state(), "loaded": sorted(set(sys.modules) - modules)}))
"""


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning:midl", "-c", program],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def imported() -> dict:
    done = run(PROGRAM, OMP_NUM_THREADS="1")  # more than there are cores is not always granted
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "stderr": done.stderr}


def test_loads_no_optional_package(imported):
    loaded = set(imported["loaded"])
    assert [name for name in HEAVY if name in loaded] == []


def test_leaves_threads_environment_and_random_state_alone(imported):
    assert imported["before"] == imported["after"]
    assert imported["after"]["threads"][0] == 1


def test_initialises_no_gpu(imported):
    assert imported["after"]["cuda"] is False


def test_prints_and_warns_nothing(imported):
    assert imported["stderr"] == ""


def test_does_not_import_the_experiments(imported):
    assert [name for name in imported["loaded"] if name.startswith(("midl.lab", "midl.cli"))] == []


def test_works_where_only_torch_is_installed():
    program = f"""
import sys
for name in {[n for n in HEAVY if not n.startswith("torch")]}:
    sys.modules[name] = None  # Importing it raises ImportError.
import torch, midl
y = midl.MIDLinear(64, 128)(torch.randn(3, 64))
y.sum().backward()
model = torch.nn.Sequential(torch.nn.Linear(64, 128))
midl.convert_(model)
midl.revert_(model)
"""
    done = run(program)
    assert done.returncode == 0, done.stderr
