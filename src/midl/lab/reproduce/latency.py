"""Latency: the trained networks of all methods of a data set, timed side by side when nothing else runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import torch

from midl.errors import MIDLError
from midl.lab.bench.dense import can_compile
from midl.lab.environment import describe_kernels, describe_machine
from midl.lab.files import read_json, write_json
from midl.lab.measure import measure_latency, measure_step
from midl.lab.methods import METHODS, find, load
from midl.lab.reproduce.execute import MODEL
from midl.lab.reproduce.plan import Plan, Task, setting_for
from midl.lab.reproduce.profiles import profile_named
from midl.lab.reproduce.state import FINISHED, read_state
from midl.serving import fuse_batch_norm_

__all__ = ["join", "latency_of", "measure_latencies", "of_runs", "timed_on"]

_PLACE = ("machine", "kernels", "threads")


def measure_latencies(plan: Plan, out: Path, dataset: str) -> Path | None:
    """Write ``latency.json`` of a data set for the methods that are trained, unless that is done; return its path.

    The first seed's networks without a variant are taken. What was timed before stays, timed again with the rest where
    a method is new, as long as the network is one of this plan's settings. None where the dense network, to which all
    are compared, is not trained. For inference batch normalisation is folded into the layers in front of it.
    """
    trained: dict[str, dict[int, Task]] = {}
    for task in plan.tasks:
        counts = task.kind == "run" and task.spec["dataset"] == dataset and _is_plain(task.spec)
        if counts and (out / task.folder / FINISHED["run"]).exists():
            trained.setdefault(task.spec["method"], {})[task.spec["seed"]] = task
    if "dense" not in trained:
        return None
    dense = next(iter(trained["dense"].values()))
    folder = out / dataset
    before = latency_of(folder)
    earlier = {} if before is None else {method: entry["run"] for method, entry in before["methods"].items()}
    runs = {method: next(iter(by_seed.values())).folder.name for method, by_seed in trained.items()}
    for method, run in earlier.items():
        seed = _seed_of(folder / run, dense)
        if seed is not None:
            planned = trained.get(method, {}).get(seed)
            runs[method] = run if planned is None else planned.folder.name
    order = [method for method in METHODS if method in runs]
    runs = {method: runs[method] for method in order}
    file = folder / "latency.json"
    if earlier == runs:
        return file
    profile = profile_named(dense.spec["profile"])
    setting = setting_for(dataset, profile.rows)
    models = {
        method: load(find(method), setting.architecture, setting.budget, folder / runs[method] / MODEL)
        for method in order
    }
    served = {method: copy.deepcopy(model) for method, model in models.items()}
    for model in served.values():
        fuse_batch_norm_(model)
    measured: dict[str, dict[str, Any]] = {method: {"run": runs[method], "batch": {}, "step": {}} for method in order}
    for batch in profile.batches:
        inputs = setting.dataset.batch(setting.dataset.test, torch.arange(batch) % len(setting.dataset.test))[0]
        compiling = profile.compiling and can_compile()
        for method, times in measure_latency(served, inputs, profile.rounds, compiling=compiling).items():
            measured[method]["batch"][str(batch)] = times
    size = dense.recipe.batch_size if profile.rows is None else profile.batches[-1]
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


def latency_of(folder: Path) -> dict[str, Any] | None:
    """Return what ``latency.json`` of a data set's folder holds, without timings that are not of pairs, or None.

    Raises:
        MIDLError: the file is damaged.
    """
    file = folder / "latency.json"
    if not file.exists():
        return None
    try:
        return of_runs(read_json(file), None)
    except (KeyError, TypeError, AttributeError) as error:
        raise MIDLError(f"{file} is damaged (no {error}), expected what midl reproduce wrote: delete it") from error


def of_runs(latency: dict[str, Any] | None, runs: Container[str] | None) -> dict[str, Any] | None:
    """Return the part of a latency file that was timed in pairs, with networks of ``runs`` (None: any), or None."""
    if latency is None:
        return None
    methods = {
        method: entry
        for method, entry in latency["methods"].items()
        if "ratio" in entry["step"] and (runs is None or entry["run"] in runs)
    }
    return {**latency, "methods": methods} if methods else None


def timed_on(latency: dict[str, Any], method: str) -> dict[str, Any]:
    """Return machine, kernels and threads of a method's timings: its own where it was timed elsewhere than the rest."""
    return {name: latency["methods"][method].get(name, latency.get(name)) for name in _PLACE}


def join(
    new: dict[str, Any] | None, old: dict[str, Any] | None, is_valid: Callable[[str, str], bool]
) -> dict[str, Any] | None:
    """Return ``new`` with the methods of ``old`` that it lacks, each with the machine that timed it if that is another.

    Args:
        new: a latency file's content, or None.
        old: likewise.
        is_valid: whether an old timing, of a method and the folder of a run, still counts.
    """
    if old is None:
        return new
    kept = {method: entry for method, entry in old["methods"].items() if is_valid(method, entry["run"])}
    if new is None:
        return {**old, "methods": kept} if kept else None
    place = {name: new.get(name) for name in _PLACE}
    methods = dict(new["methods"])
    for method in kept.keys() - methods.keys():
        own = timed_on(old, method)
        plain = {name: value for name, value in kept[method].items() if name not in _PLACE}
        methods[method] = plain if own == place else {**plain, **own}
    return {**new, "methods": methods}


def _seed_of(folder: Path, dense: Task) -> int | None:
    """Return the seed of a finished run with the budget, data and profile of ``dense``; None for any other folder."""
    state = read_state(folder)
    if state is None or state.finished is None or not _is_plain(state.spec):
        return None
    settings = read_json(folder / "run.json")["settings"]
    same = all(settings[name] == dense.settings[name] for name in ("budget", "data", "results_version"))
    return state.spec["seed"] if same and state.spec["profile"] == dense.spec["profile"] else None


def _is_plain(spec: dict[str, Any]) -> bool:
    return spec["train_fraction"] == 1 and not spec["label_noise"]
