"""The profiles: which runs a sweep consists of and how much each may cost."""

from __future__ import annotations

import dataclasses

from midl.errors import MIDLError
from midl.lab.methods import METHODS
from midl.lab.recipes import Recipes
from midl.lab.training import Precision

__all__ = ["PROFILES", "Grid", "Profile", "profile_named"]


@dataclasses.dataclass(frozen=True)
class Grid:
    """How every method chooses its learning rate and weight decay: one training per point, scored on held-out rows.

    Args:
        lr_factors: of the recipe's learning rate.
        weight_decays: of AdamW.
        rows: share of the training rows that is used, before the validation rows are held out.
        epochs: share of the recipe's epochs.
    """

    lr_factors: tuple[float, ...]
    weight_decays: tuple[float, ...]
    rows: float
    epochs: float

    @property
    def points(self) -> list[tuple[float, float]]:
        """All pairs of a learning rate factor and a weight decay."""
        return [(factor, decay) for factor in self.lr_factors for decay in self.weight_decays]


@dataclasses.dataclass(frozen=True)
class Profile:
    """A sweep.

    Args:
        name: on the command line.
        datasets: in this order.
        seeds: of every method.
        grid: of the choice of learning rate and weight decay.
        grids: data set to its grid, where another.
        rows: (training, test) rows at most; None: all.
        epochs: (training, distillation); None: the recipe's.
        distilled_epochs: data set to epochs of distillation, where ``epochs`` is None and not the recipe's.
        precisions: data set to how it is trained, as accelerate names it; others in float32.
        methods: data set to its methods, where not all.
        studied: data sets of the overfitting study.
        study_methods: methods of the overfitting study.
        fractions: shares of the training rows in the study, beside all.
        noises: shares of random labels in the study, beside none.
        batches: sizes at which latency is measured.
        rounds: of the latency measurement.
        compiling: whether each network may be compiled for the latency measurement, where it is faster so.
        fit_rows: training inputs that ``Method.fit`` is given, at most.
        measured_rows: test rows for each measure; None: each measure's own choice.
    """

    name: str
    datasets: tuple[str, ...]
    seeds: tuple[int, ...]
    grid: Grid
    rows: tuple[int, int] | None = None
    epochs: tuple[int, int] | None = None
    grids: dict[str, Grid] = dataclasses.field(default_factory=dict)
    distilled_epochs: dict[str, int] = dataclasses.field(default_factory=dict)
    precisions: dict[str, Precision] = dataclasses.field(default_factory=dict)
    methods: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    studied: tuple[str, ...] = ()
    study_methods: tuple[str, ...] = ("dense", "dropout", "scratch", "converted")
    fractions: tuple[float, ...] = (0.01, 0.05, 0.1)
    noises: tuple[float, ...] = (0.2, 0.4)
    batches: tuple[int, ...] = (1, 32, 256)
    rounds: int = 201
    compiling: bool = True
    fit_rows: int = 2048
    measured_rows: int | None = None

    def grid_for(self, dataset: str) -> Grid:
        """Return the grid of a data set."""
        return self.grids.get(dataset, self.grid)

    def methods_for(self, dataset: str) -> tuple[str, ...]:
        """Return the methods of a data set, in the order in which they run."""
        return self.methods.get(dataset, _METHODS)

    def epochs_for(self, dataset: str, recipes: Recipes) -> tuple[int, int]:
        """Return for how long training and distillation take on a data set."""
        if self.epochs is not None:
            return self.epochs
        return recipes.train.epochs, self.distilled_epochs.get(dataset, recipes.distill.epochs)

    def precision_for(self, dataset: str) -> Precision:
        """Return how a data set is trained unless asked for otherwise."""
        return self.precisions.get(dataset, "no")

    def variants(self, dataset: str) -> list[tuple[float, float]]:
        """Return (training fraction, label noise) of the study's runs on a data set."""
        if dataset not in self.studied:
            return []
        return [(fraction, 0.0) for fraction in self.fractions] + [(1.0, noise) for noise in self.noises]


# Left out on IMDB, whose Transformer is best from scratch: converted networks that are taught for long, "gated", which
# keeps the gates where `adapted` makes a layer its light path alone, and the controls of what teaching alone gives.
# A smoke sweep has them on digits.
_LONG_TAUGHT = ("distilled", "distilled_long", "narrow_distilled", "gated", "gated_long")
_METHODS = tuple(method for method in METHODS if method not in _LONG_TAUGHT)
_PHOTOGRAPHS: tuple[str, ...] = ("cifar10", "cifar100", "svhn")
_PAPER_SETS = ("mnist", "adult", "imdb", *_PHOTOGRAPHS)

# Left out on CIFAR-100: the weaker baselines, and a network for several budgets where one was no better at its own.
_WEAKER = ("dropout", "low_rank", "magnitude", "k_winners", "elastic")

# Where one training takes minutes, tuning takes fewer rows.
_BRIEF = Grid(lr_factors=(0.33, 1.0, 3.0), weight_decays=(0.01, 0.1), rows=0.2, epochs=0.5)

PROFILES = {
    "smoke": Profile(
        name="smoke",
        datasets=("digits", *_PAPER_SETS),
        seeds=(0,),
        grid=Grid(lr_factors=(1.0, 3.0), weight_decays=(0.01,), rows=1.0, epochs=0.5),
        rows=(128, 100),
        epochs=(2, 1),
        studied=("digits",),
        fractions=(0.1,),
        noises=(0.4,),
        batches=(1, 16),
        rounds=3,
        compiling=False,
        methods={"digits": tuple(METHODS)},
        fit_rows=16,
        measured_rows=60,
    ),
    "paper": Profile(
        name="paper",
        datasets=_PAPER_SETS,
        seeds=(0, 1, 2),
        grid=Grid(lr_factors=(0.33, 1.0, 3.0), weight_decays=(0.01, 0.1), rows=0.4, epochs=0.5),
        grids=dict.fromkeys(("imdb", *_PHOTOGRAPHS), _BRIEF),
        # A convolution with a gate needs longer than two epochs to become what its teacher is.
        distilled_epochs=dict.fromkeys(_PHOTOGRAPHS, 6),
        precisions=dict.fromkeys(_PHOTOGRAPHS, "bf16"),
        methods={
            **dict.fromkeys(("mnist", "adult", "cifar10", "svhn"), tuple(METHODS)),
            "cifar100": tuple(method for method in METHODS if method not in _WEAKER),
        },
        studied=("mnist", "adult"),
    ),
}


def profile_named(name: str) -> Profile:
    """Return a profile.

    Raises:
        MIDLError: unknown name; the message lists the known ones.
    """
    if name not in PROFILES:
        raise MIDLError(f"reproduce: profile={name!r} is unknown, expected one of {list(PROFILES)}")
    return PROFILES[name]
