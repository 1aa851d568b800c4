"""Made-up results of a sweep, in the schema of midl reproduce, with known differences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

METHODS = ("dense", "dropout", "narrow", "low_rank", "magnitude", "k_winners", "scratch", "converted", "elastic")
OFFSETS = dict(zip(METHODS, (0, 0.2, -1.0, -4.0, -1.5, -2.0, -0.8, 0.3, -0.2), strict=True))
LEVELS = {"mnist": 98.0, "adult": 85.0, "cifar10": 88.0}
MID = ("scratch", "converted", "elastic")


def write_sweep(folder: Path, datasets: tuple[str, ...] = ("mnist", "adult"), seeds: int = 3) -> Path:
    """Write a sweep's folder: every method and seed, the overfitting study of mnist, latencies."""
    for dataset in datasets:
        for seed in range(seeds):
            for method in METHODS:
                _write(folder, make_record(dataset, method, seed))
                if dataset == "mnist" and method in ("dense", "dropout", "scratch", "converted"):
                    for fraction, noise in ((0.1, 0.0), (0.01, 0.0), (1.0, 0.4)):
                        _write(folder, make_record(dataset, method, seed, fraction, noise))
        (folder / dataset / "latency.json").write_text(json.dumps(make_latency()))
    return folder


def _write(folder: Path, record: dict[str, Any]) -> None:
    spec = record["spec"]
    name = f"{spec['method']}-s{spec['seed']}-{spec['train_fraction']}-{spec['label_noise']}"
    file = folder / spec["dataset"] / name / "result.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record))


def make_record(
    dataset: str, method: str, seed: int, fraction: float = 1.0, noise: float = 0.0, profile: str = "paper"
) -> dict[str, Any]:
    """Return one result; accuracies of a seed differ between methods by ``OFFSETS`` give or take 0.02."""
    generator = np.random.default_rng([seed, METHODS.index(method)])
    shared = np.random.default_rng(seed).normal(0, 0.2)
    hard = 10 * (1 - fraction) + 20 * noise
    accuracy = LEVELS[dataset] + OFFSETS[method] + shared + generator.normal(0, 0.02) - hard
    sparse = method not in ("dense", "dropout", "low_rank")
    dense_flops = 3_700_000
    return {
        "version": 1,
        "spec": {
            "dataset": dataset, "method": method, "seed": seed, "profile": profile, "train_fraction": fraction,
            "label_noise": noise, "recipe": {"epochs": 8}, "architecture": {"kind": "MLP"}, "tuned": {"lr": 0.001},
        },
        "environment": {
            "command": "midl reproduce", "commit": "0123456789abcdef", "versions": {"torch": "2.9", "midl": "0.1.0"},
            "machine": {"cpu": "A <processor> & more", "threads": 2, "instruction_set": "AVX2", "system": "Linux"},
        },
        "accuracy": accuracy, "train_accuracy": accuracy + 1.0 + hard * (0.5 if method in MID else 0.9),
        "accuracy_before_distillation": None, "losses": [1.0, 0.5], "seconds": 30.0,
        "flops": dense_flops if method in ("dense", "dropout") else dense_flops / 1.705, "dense_flops": dense_flops,
        "active_neurons": 896 if sparse else 2048, "neurons": 2048,
        "fraction_active": {"hidden1": 0.4375}, "parameters": 2_110_000, "weight_bytes": 8_440_000,
        "saved_bytes": 11_000, "peak_bytes": 90_000_000,
        "measures": make_measures(method, accuracy, generator),
    }  # fmt: skip


def make_measures(method: str, accuracy: float, generator: np.random.Generator) -> dict[str, Any]:
    strengths = [0.0, 0.25, 0.5, 1.0]
    curves = {
        name: {
            "unit": unit, "strengths": strengths, "area": accuracy - slope / 2,
            "accuracy": [round(accuracy - slope * s, 2) for s in strengths],
        }
        for name, unit, slope in (("gaussian", "standard deviations", 20), ("salt_and_pepper", "fraction", 40))
    }  # fmt: skip
    measures: dict[str, Any] = {"robustness": {"rows": 100, "curves": curves}}
    layers = ("hidden1", "hidden2") if method in MID else ()
    edges = np.linspace(-3, 3, 21).round(2).tolist()
    bell = [int(1000 * np.exp(-(x**2) / 2)) for x in edges[:-1]]
    histogram = {
        "edges": edges,
        "all": bell,
        "selected": [v if x > 0 else 0 for v, x in zip(bell, edges, strict=False)],
    }
    measures["activity"] = {
        "rows": 100,
        "layers": {name: generator.random((10, 16)).round(3).tolist() for name in layers},
    }
    measures["gate"] = {
        "rows": 100,
        "layers": {name: {"interpolation": "sigmoid", "logits": histogram, "values": histogram} for name in layers},
    }

    def around(value: float) -> dict[str, float]:
        value += generator.normal(0, 0.002)
        return {"mean": value, "low": value - 0.02, "high": value + 0.02}

    views = {
        "inputs": {"selected": 0.5, "unselected": 0.3, "random": 0.2},
        "neurons": {"selected": 0.5, "unselected": 0.6, "random": 0.55},
    }
    sets = {
        view: {
            **{name: around(value) for name, value in by_set.items()},
            **{f"selected-{o}": around(by_set["selected"] - by_set[o]) for o in ("unselected", "random")},
        }
        for view, by_set in views.items()
    }
    overall = {view: {k: v for k, v in by_set.items() if "-" in k} for view, by_set in sets.items()} if layers else {}
    measures["smi"] = {
        "unit": "nats", "rows": 100, "slices": 8, "layers": dict.fromkeys(layers, sets), "overall": overall,
    }  # fmt: skip
    return measures


def make_latency() -> dict[str, Any]:
    def times(median: float, method: str, form: str | None = None) -> dict[str, Any]:
        ratio = {"dense": 1.0, "dropout": 1.0}.get(method, 0.6)
        return {
            "median": median * ratio, "low": median * ratio * 0.97, "high": median * ratio * 1.03,
            "ratio": ratio, "ratio_low": ratio * 0.98, "ratio_high": ratio * 1.02,
            **({} if form is None else {"form": form}),
        }  # fmt: skip

    return {
        "machine": {"cpu": "A <processor> & more", "threads": 2}, "threads": 2,
        "methods": {
            method: {
                "run": f"{method}-s0-1.0-0.0",
                "batch": {
                    "1": times(6e-4, method, "eager"),
                    "32": times(2e-3, method, "compiled"),
                    "256": times(9e-3, method),
                },
                "step": times(2e-2, method),
            }
            for method in METHODS
        },
    }  # fmt: skip
