"""Latency: the trained networks of all methods of a data set, timed side by side when nothing else runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from midl.lab.environment import describe_kernels, describe_machine
from midl.lab.files import write_json
from midl.lab.measure import measure_latency, measure_step
from midl.lab.methods import METHODS, find, load
from midl.lab.reproduce.execute import MODEL
from midl.lab.reproduce.plan import Plan, Task, setting_for
from midl.lab.reproduce.profiles import profile_named
from midl.lab.reproduce.state import FINISHED

__all__ = ["has_ratios", "measure_latencies"]


def measure_latencies(plan: Plan, out: Path, dataset: str) -> Path | None:
    """Write ``latency.json`` of a data set for the methods that are trained, unless that is done; return its path.

    The first seed's networks without a variant are taken. None where the dense network, to which all are compared, is
    not trained.
    """
    tasks = {
        task.spec["method"]: task
        for task in reversed(plan.tasks)
        if task.kind == "run" and task.spec["dataset"] == dataset and _plain(task)
        and (out / task.folder / FINISHED["run"]).exists()
    }  # fmt: skip
    if "dense" not in tasks:
        return None
    order = [method for method in METHODS if method in tasks]
    file = out / dataset / "latency.json"
    runs = {method: tasks[method].folder.name for method in order}
    if _runs_of(file) == runs:
        return file
    profile = profile_named(tasks["dense"].spec["profile"])
    setting = setting_for(dataset, profile.rows)
    models = {
        method: load(find(method), setting.architecture, setting.budget, out / tasks[method].folder / MODEL)
        for method in order
    }
    measured: dict[str, dict[str, Any]] = {method: {"run": runs[method], "batch": {}, "step": {}} for method in order}
    for batch in profile.batches:
        inputs = setting.dataset.batch(setting.dataset.test, torch.arange(batch) % len(setting.dataset.test))[0]
        for method, times in measure_latency(models, inputs, profile.rounds).items():
            measured[method]["batch"][str(batch)] = times
    size = tasks["dense"].recipe.batch_size if profile.rows is None else profile.batches[-1]
    inputs, labels = setting.dataset.batch(setting.dataset.train, torch.arange(size) % len(setting.dataset.train))
    for method, times in measure_step(models, inputs, labels, max(3, profile.rounds // 4)).items():
        measured[method]["step"] = {"batch": size, **times}
    write_json(
        file,
        {
            "machine": describe_machine(), "kernels": describe_kernels(), "threads": torch.get_num_threads(),
            "methods": measured,
        },
    )  # fmt: skip
    return file


def has_ratios(latency: dict[str, Any]) -> bool:
    """Return whether the content of a ``latency.json`` was timed in pairs, as older ones were not."""
    return all("ratio" in entry["step"] for entry in latency["methods"].values())


def _runs_of(file: Path) -> dict[str, str] | None:
    """Return the runs, by method, that a file was measured with, or None where there is none to build on."""
    content = json.loads(file.read_text()) if file.exists() else None
    if content is None or not has_ratios(content):
        return None
    return {method: entry["run"] for method, entry in content["methods"].items()}


def _plain(task: Task) -> bool:
    return task.spec["train_fraction"] == 1 and not task.spec["label_noise"]
