"""The plan: every run of a sweep, what it depends on and the folder that its content names."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from midl.errors import DataError, MIDLError
from midl.lab import data
from midl.lab.data.mirror import SPLITS, mirror_path
from midl.lab.files import hash_json
from midl.lab.methods import Budget, find
from midl.lab.models import Architecture, architecture_for, describe
from midl.lab.recipes import active_for, group_size_for, recipes_for
from midl.lab.reproduce.profiles import Profile, profile_named
from midl.lab.training import Precision, Recipe

__all__ = ["MEASURES_VERSION", "RESULTS_VERSION", "Plan", "Request", "Setting", "Task", "make_plan", "setting_for"]

# Part of every folder's name: raise it when code that is not among a run's settings changes what runs give (training,
# scoring, models). A method's own changes show in its ``settings``, a data set's in its fingerprint.
RESULTS_VERSION = 1

# In every result: raise it when the measures change; finished runs are then measured again, without training.
MEASURES_VERSION = 1

# A small share of the rows gets more epochs, so that the networks can fit them, but not more than this many times.
_MOST_REPEATS = 10

_LARGEST_SEED = 2**32 - 1  # of numpy and scikit-learn


@dataclasses.dataclass(frozen=True)
class Request:
    """What a sweep was asked for; None: all that the profile has.

    Args:
        profile: its name.
        datasets: their names.
        methods: their names; what they depend on is added.
        seeds: random seeds.
        precision: of training, as accelerate names it; None: what the profile has for each data set.
    """

    profile: str
    datasets: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    precision: Precision | None = None

    def __post_init__(self) -> None:
        profile_named(self.profile)
        for dataset in self.datasets or ():
            data.find(dataset)
        for method in self.methods or ():
            find(method)
        for name in ("datasets", "methods", "seeds"):
            values = getattr(self, name)
            if values is not None and (not values or len(set(values)) != len(values)):
                raise MIDLError(f"reproduce: {name}={values!r}, expected different values, at least one")
        if self.seeds is not None and not 0 <= min(self.seeds) <= max(self.seeds) <= _LARGEST_SEED:
            raise MIDLError(f"reproduce: seeds={self.seeds!r}, expected integers from 0 to {_LARGEST_SEED}")
        if self.precision is not None and self.precision not in get_args(Precision):
            raise MIDLError(f"reproduce: precision={self.precision!r}, expected one of {get_args(Precision)}")


@dataclasses.dataclass(frozen=True)
class Task:
    """One folder of the sweep: the choice of a method's hyperparameters, or a training that is scored.

    Args:
        kind: which of the two.
        spec: data set, method, seed, variant, recipe and architecture: what readers want to know.
        settings: everything that the outcome depends on, as JSON values.
        folder: relative to the sweep's.
        needs: folders that must be finished first.
    """

    kind: Literal["tuning", "run"]
    spec: dict[str, Any]
    settings: dict[str, Any]
    folder: Path
    needs: tuple[Path, ...]

    @property
    def recipe(self) -> Recipe:
        """The recipe before tuning."""
        return Recipe(**self.spec["recipe"])

    @property
    def tuning(self) -> Path:
        """Folder of the tuning that the run takes its learning rate and weight decay from."""
        return self.needs[0]

    @property
    def teacher(self) -> Path | None:
        """Folder of the trained dense network, where the method needs one."""
        return self.needs[-1] if find(self.spec["method"]).teacher else None

    @property
    def work(self) -> float:
        """Training rows times epochs, for estimates of time."""
        return float(self.settings["work"])


@dataclasses.dataclass(frozen=True)
class Plan:
    """The tasks in the order in which they should run, and the data sets that are left out, with the reason."""

    tasks: tuple[Task, ...]
    left_out: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all runs on one data set share."""

    dataset: data.Dataset
    architecture: Architecture
    budget: Budget


@functools.cache  # rows are mapped from the cache's files
def setting_for(name: str, rows: tuple[int, int] | None) -> Setting:
    """Load a data set, with so many training and test rows or all, and return what its runs share."""
    dataset = data.load(name)
    if rows is not None:
        dataset = _few_rows(dataset, *rows)
    architecture = architecture_for(name, dataset.input_shape, dataset.num_classes)
    with torch.random.fork_rng(devices=[]):
        budget = Budget.for_network(architecture, group_size_for(name), active=active_for(name))
    return Setting(dataset, architecture, budget)


def make_plan(request: Request, say: Callable[[str], None] = lambda line: None) -> Plan:
    """Return the tasks of a sweep.

    A data set that the mirror lacks, that cannot be read, or that has none of the methods asked for is left out with
    the reason.

    Args:
        request: what was asked for.
        say: told, line by line, which data set is read and which is left out.
    """
    profile = profile_named(request.profile)
    tasks: dict[Path, Task] = {}
    left_out = {}
    for dataset in request.datasets or profile.datasets:
        try:
            _check_present(dataset, profile)
            say(f"{dataset}: reading")
            setting = setting_for(dataset, profile.rows)
        except DataError as error:
            left_out[dataset] = str(error)
            say(f"{dataset}: left out: {error}")
            continue
        planner = _Planner(profile, setting, request.precision or profile.precision_for(dataset), tasks)
        known = profile.methods_for(dataset)
        methods = [method for method in known if request.methods is None or method in request.methods]
        if not methods:
            left_out[dataset] = f"of its methods in profile {profile.name} ({', '.join(known)}) none was asked for"
            say(f"{dataset}: left out: {left_out[dataset]}")
            continue
        for method in methods:
            planner.tuning(method)
        for seed in request.seeds or profile.seeds:
            for method in methods:
                planner.run(method, seed)
        for fraction, noise in profile.variants(dataset):
            for seed in request.seeds or profile.seeds:
                for method in methods:
                    if method in profile.study_methods:
                        planner.run(method, seed, fraction, noise)
    return Plan(tuple(tasks.values()), left_out)


class _Planner:
    """Adds the tasks of one data set, what they need first."""

    def __init__(
        self, profile: Profile, setting: Setting, precision: Precision, tasks: dict[Path, Task]
    ) -> None:  # fmt: skip
        self._profile, self._setting, self._precision, self._tasks = profile, setting, precision, tasks

    def tuning(self, method: str) -> Path:
        grid = self._profile.grid_for(self._setting.dataset.name)
        needs = (self.tuning("dense"),) if find(method).teacher else ()
        recipe = self._recipe(method)
        recipe = dataclasses.replace(recipe, epochs=max(1, round(recipe.epochs * grid.epochs)))
        rows = self._rows * grid.rows * 0.8
        return self._add(
            "tuning", f"{method}-tuning", needs, {"method": method, "recipe": dataclasses.asdict(recipe)},
            {"grid": dataclasses.asdict(grid), "work": rows * recipe.epochs * len(grid.points)},
        )  # fmt: skip

    def run(self, method: str, seed: int, fraction: float = 1.0, noise: float = 0.0) -> Path:
        needs: tuple[Path, ...] = (self.tuning(method),)
        if find(method).teacher:
            needs = (*needs, self.run("dense", seed, fraction, noise))
        recipe = self._recipe(method)
        repeats = min(_MOST_REPEATS, round(1 / fraction))
        recipe = dataclasses.replace(recipe, epochs=recipe.epochs * repeats)
        spec = {
            "method": method, "seed": seed, "train_fraction": fraction, "label_noise": noise,
            "recipe": dataclasses.asdict(recipe),
        }  # fmt: skip
        name = f"{method}-s{seed}" + (f"-f{fraction:g}" if fraction < 1 else "") + (f"-n{noise:g}" if noise else "")
        return self._add("run", name, needs, spec, {"work": self._rows * fraction * recipe.epochs})

    @property
    def _rows(self) -> int:
        return len(self._setting.dataset.train)

    def _recipe(self, method: str) -> Recipe:
        recipes = recipes_for(self._setting.dataset.name)
        chosen = find(method)
        epochs = self._profile.epochs_for(self._setting.dataset.name, recipes)
        if chosen.long:
            recipe = dataclasses.replace(recipes.train, epochs=sum(epochs))
        elif chosen.teacher:
            recipe = dataclasses.replace(recipes.distill, epochs=epochs[1])
        else:
            recipe = dataclasses.replace(recipes.train, epochs=epochs[0])
        return dataclasses.replace(recipe, precision=self._precision)

    def _add(
        self, kind: Literal["tuning", "run"], name: str, needs: tuple[Path, ...], spec: dict[str, Any],
        settings: dict[str, Any],
    ) -> Path:  # fmt: skip
        dataset, architecture = self._setting.dataset, self._setting.architecture
        kd_ratio = recipes_for(dataset.name).kd_ratio
        if find(spec["method"]).teacher and kd_ratio < 1:
            settings = {**settings, "kd_ratio": kd_ratio}
        if find(spec["method"]).teacher and self._precision != "no":
            settings = {**settings, "teacher": self._precision}  # it ran in float32 before
        if not data.in_random_order(dataset.train.y):
            settings = {**settings, "rows": "random"}  # see rows_for_all
        spec = {
            "dataset": dataset.name, "profile": self._profile.name, **spec,
            "architecture": describe(architecture),
        }  # fmt: skip
        settings = {
            "results_version": RESULTS_VERSION,
            "spec": spec,
            "data": dataset.fingerprint,
            "method": find(spec["method"]).settings,
            "budget": dataclasses.asdict(self._setting.budget),
            "needs": [path.name for path in needs],
            **settings,
        }
        folder = Path(dataset.name) / f"{name}-{hash_json(settings)[:10]}"
        self._tasks.setdefault(folder, Task(kind, spec, settings, folder, needs))
        return folder


def _check_present(name: str, profile: Profile) -> None:
    """Raise where the data set would have to come from a mirror that lacks it, or a smoke run from a download."""
    if not data.find(name).columns:  # embedded
        return
    mirror = mirror_path()
    if mirror is None:
        if profile.name == "smoke":
            raise DataError(f"dataset={name!r}: a smoke sweep downloads nothing, expected MIDL_DATA to name a mirror")
        return
    missing = [split for split in SPLITS if not (mirror / name / f"{split}.parquet").is_file()]
    if missing:
        raise DataError(f"dataset={name!r}: the mirror {mirror} has no {name}/{missing[0]}.parquet")


def _few_rows(dataset: data.Dataset, train: int, test: int) -> data.Dataset:
    def some(split: data.Split, rows: int) -> data.Split:
        chosen = data.rows_for_all(split.y, rows)
        return data.Split(split.x[chosen], split.y[chosen])

    which = "first" if all(data.in_random_order(split.y) for split in (dataset.train, dataset.test)) else "random"
    return dataclasses.replace(
        dataset,
        train=some(dataset.train, train),
        test=some(dataset.test, test),
        fingerprint=f"{dataset.fingerprint}-{which}-{train}-{test}",
    )
