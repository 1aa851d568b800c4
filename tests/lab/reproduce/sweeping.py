"""A small sweep on digits and its results, for the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from midl.lab.reproduce.plan import Request
from midl.lab.reproduce.sweep import Options, Sweep, sweep

REQUEST = Request("smoke", ("digits",), ("dense", "converted"))
QUICK = Options(threads=1, latency=False)


def run(out: Path, request: Request = REQUEST, options: Options = QUICK) -> tuple[Sweep, list[str]]:
    """Run a sweep and return it with the lines that it said."""
    lines: list[str] = []
    found = sweep(request, out, options, lines.append)
    assert found is not None
    return found, [line for line in lines if not line.endswith("reading")]


def results(out: Path) -> dict[str, Any]:
    """Return what every finished task found, by folder, without times and machine."""
    found = {}
    for file in [*out.glob("*/*/result.json"), *out.glob("*/*/tuned.json")]:
        result = json.loads(file.read_text())
        for part in ("environment", "seconds", "measure_seconds"):
            result.pop(part, None)
        for point in result.get("points", []):
            del point["seconds"]
        found[str(file.parent.relative_to(out))] = result
    return found


def assert_same_models(one: Path, other: Path) -> None:
    """Compare the weights of all trained models, bit for bit."""
    files = sorted(file.relative_to(one) for file in one.glob("*/*/model.safetensors"))
    assert files == sorted(file.relative_to(other) for file in other.glob("*/*/model.safetensors"))
    for file in files:
        a, b = load_file(one / file), load_file(other / file)
        assert all(torch.equal(a[name], b[name]) for name in a)


def logs(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Return every task's epochs with their losses, by folder, without times."""
    found = {}
    for file in out.glob("*/*/log.jsonl"):
        entries = [json.loads(line) for line in file.read_text().splitlines()]
        found[str(file.parent.relative_to(out))] = [{k: v for k, v in e.items() if k != "seconds"} for e in entries]
    return found
