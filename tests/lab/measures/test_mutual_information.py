"""The k-nearest-neighbour estimate against scikit-learn's and against values known from integration."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import trapezoid
from scipy.stats import norm
from sklearn.feature_selection import mutual_info_classif

from midl.errors import MIDLError
from midl.lab.measures.mutual_information import estimate_mutual_information
from midl.lab.measures.smi import sliced_mutual_information


def gaussian_mixture(means: list[float], rows: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    labels = generator.integers(0, len(means), rows)
    return np.array(means)[labels] + generator.standard_normal(rows), labels


def mixture_information(means: list[float]) -> float:
    """H(X) - H(X | Y) of equally likely unit Gaussians, by numerical integration."""

    x = np.linspace(min(means) - 9, max(means) + 9, 20_001)
    density = np.mean([norm.pdf(x, mean) for mean in means], axis=0)
    entropy = trapezoid(-density * np.log(density), x)
    return entropy - 0.5 * np.log(2 * np.pi * np.e)


@pytest.mark.parametrize("means", [[0.0, 0.0], [0.0, 1.0], [0.0, 3.0], [0.0, 2.0, 4.0], [0.0, 20.0]])
def test_gaussian_mixtures_have_the_integrated_information(means: list[float]) -> None:
    values, labels = gaussian_mixture(means)
    assert estimate_mutual_information(values[:, None], labels)[0] == pytest.approx(
        mixture_information(means), abs=0.03
    )


@pytest.mark.parametrize(("classes", "rows", "neighbours"), [(2, 300, 3), (10, 500, 3), (30, 600, 3), (3, 60, 7)])
def test_it_is_scikit_learns_estimate(classes: int, rows: int, neighbours: int) -> None:
    generator = np.random.default_rng(0)
    # As many rows in each class: below twice the neighbours scikit-learn's own distances are only roughly right.
    labels = np.arange(rows) % classes
    values = generator.standard_normal((rows, 5)) + labels[:, None] * np.linspace(0.2, 3, 5)
    expected = mutual_info_classif(values, labels, discrete_features=False, n_neighbors=neighbours, random_state=0)
    ours = estimate_mutual_information(values, labels, neighbours)
    assert np.maximum(ours, 0) == pytest.approx(expected, abs=1e-9)


def test_independent_values_average_to_zero_and_a_copy_of_the_label_to_its_entropy() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 1000)
    independent = estimate_mutual_information(generator.standard_normal((1000, 200)), labels)
    assert abs(independent.mean()) < 0.003
    assert independent.min() < 0  # not clipped
    copied = estimate_mutual_information(labels[:, None].astype(float), labels)
    assert copied[0] == pytest.approx(np.log(4), abs=0.02)


def test_constant_columns_and_classes_of_one_row_do_no_harm() -> None:
    labels = np.array([0] * 50 + [1] * 50 + [2])
    values = np.stack([np.zeros(101), np.r_[np.zeros(50), np.ones(50), 5.0]], axis=1)
    constant, informative = estimate_mutual_information(values, labels)
    assert abs(constant) < 0.2
    assert informative == pytest.approx(np.log(2), abs=0.05)


def test_shift_and_scale_do_not_matter() -> None:
    values, labels = gaussian_mixture([0.0, 1.0], rows=500)
    one, other = estimate_mutual_information(np.stack([values, 1000 * values - 7], axis=1), labels)
    assert one == pytest.approx(other, abs=1e-6)


@pytest.mark.parametrize(
    ("values", "labels", "message"),
    [
        (np.full((4, 1), np.nan), np.zeros(4), "values has NaN or infinity"),
        (np.zeros((3, 1)), np.arange(3), "no class of two rows"),
    ],
)
def test_useless_inputs_are_errors(values: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(MIDLError, match=message):
        estimate_mutual_information(values, labels)


def test_slices_of_a_gaussian_mixture_have_the_integrated_mean() -> None:
    """Of two unit Gaussians in the plane, 3 apart, the slice at angle t has means 3 cos t apart."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 3000)
    values = generator.standard_normal((3000, 2))
    values[:, 0] += 3.0 * labels
    angles = np.linspace(0, np.pi / 2, 30)
    expected = np.mean([mixture_information([0.0, 3 * np.cos(angle)]) for angle in angles])
    slices = sliced_mutual_information(values, labels, slices=256)
    assert slices.mean() == pytest.approx(expected, abs=0.03)
