"""Training: wherever it is interrupted, starting again ends with the very same weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import midl
from midl.errors import CheckpointError, MIDLError
from midl.lab.data import Dataset
from midl.lab.data.dataset import Arrays
from midl.lab.distillation import distillation_loss
from midl.lab.training import Precision, Recipe, train

RECIPE = Recipe(epochs=3, batch_size=16)
STEPS = 3 * 4  # 50 rows: three full batches and one of two rows per epoch


class StopError(Exception):
    pass


@pytest.fixture
def dataset() -> Dataset:
    generator = np.random.default_rng(0)
    x = generator.standard_normal((70, 8)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int64)
    return Dataset.from_arrays(
        "toy", 2, Arrays(x[:50], y[:50], x[50:], y[50:], np.zeros(8, np.float32), np.ones(8, np.float32))
    )


def build() -> nn.Module:
    torch.manual_seed(1)
    # Noise: the random state during training matters too.
    return nn.Sequential(midl.MIDLinear(8, 16, rank=2, noise=0.5), nn.ReLU(), nn.Linear(16, 2))


def interrupt_after(steps: int) -> object:
    def on_step(done: int, total: int) -> None:
        assert total == STEPS
        if done == steps:
            raise StopError

    return on_step


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("interruptions", [(1,), (4,), (5,), (8,), (12,), (2, 3, 7, 11)])
def test_an_interrupted_run_ends_as_the_undisturbed_one(
    dataset: Dataset, tmp_path: Path, interruptions: tuple[int, ...]
) -> None:
    undisturbed = build()
    losses = train(undisturbed, dataset, RECIPE, seed=5)
    checkpoint = tmp_path / "run.safetensors"
    for steps in interruptions:
        with pytest.raises(StopError):
            train(build(), dataset, RECIPE, seed=5, checkpoint=checkpoint, on_step=interrupt_after(steps))  # type: ignore[arg-type]
    resumed = build()
    torch.manual_seed(99)  # the surrounding random state must not matter
    assert train(resumed, dataset, RECIPE, seed=5, checkpoint=checkpoint) == losses
    assert_same_weights(resumed, undisturbed)


def test_a_finished_checkpoint_gives_the_final_weights_without_training(dataset: Dataset, tmp_path: Path) -> None:
    first, second = build(), build()
    train(first, dataset, RECIPE, seed=0, checkpoint=tmp_path / "c")
    train(second, dataset, RECIPE, seed=0, checkpoint=tmp_path / "c", on_step=lambda *_: pytest.fail("trained again"))
    assert_same_weights(first, second)


def test_the_seed_decides_and_the_callers_random_state_is_left_alone(dataset: Dataset) -> None:
    one, same, other = build(), build(), build()
    train(one, dataset, RECIPE, seed=0)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    train(same, dataset, RECIPE, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    train(other, dataset, RECIPE, seed=1)
    assert_same_weights(one, same)
    assert not torch.equal(one[2].weight, other[2].weight)  # type: ignore[index]


def test_training_learns(dataset: Dataset) -> None:
    losses = train(nn.Linear(8, 2), dataset, Recipe(epochs=20, batch_size=16, lr=0.1), seed=0)
    assert losses[-1] < losses[0] / 4


def test_a_distilled_student_approaches_its_teacher(dataset: Dataset) -> None:
    teacher = build().eval()
    torch.manual_seed(2)
    student = nn.Linear(8, 2)
    losses = train(student, dataset, Recipe(epochs=20, batch_size=16, lr=1e-2), seed=0, loss=distillation_loss(teacher))
    assert losses[-1] < losses[0] / 2
    assert teacher[2].weight.grad is None  # type: ignore[index]


def test_a_damaged_checkpoint_is_an_error_that_names_it(dataset: Dataset, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.safetensors"
    train(build(), dataset, RECIPE, seed=0, checkpoint=checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"run\.safetensors is no checkpoint of this run .*delete it"):
        train(build(), dataset, RECIPE, seed=0, checkpoint=checkpoint)


def test_a_checkpoint_of_another_model_is_an_error(dataset: Dataset, tmp_path: Path) -> None:
    train(nn.Linear(8, 2), dataset, RECIPE, seed=0, checkpoint=tmp_path / "c")
    with pytest.raises(CheckpointError, match="is no checkpoint of this run"):
        train(build(), dataset, RECIPE, seed=0, checkpoint=tmp_path / "c")


def test_a_loss_that_explodes_is_an_error(dataset: Dataset) -> None:
    with pytest.raises(MIDLError, match=r"the loss of epoch 1 is (nan|inf), expected a finite one"):
        train(build(), dataset, RECIPE, seed=0, loss=lambda x, logits, y: logits.sum() * float("inf"))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, r"epochs=0, expected at least 1"),
        ("batch_size", 0, r"batch_size=0, expected at least 1"),
        ("lr", 0.0, r"lr=0\.0, expected a number above 0"),
        ("warmup", 1.0, r"warmup=1\.0, expected a fraction in \[0, 1\)"),
    ],
)
def test_recipe_refuses_wrong_values(field: str, value: float, message: str) -> None:
    with pytest.raises(MIDLError, match=message):
        Recipe(**{"epochs": 1, field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_a_teacher_runs_in_the_precision_of_the_recipe(
    dataset: Dataset, precision: Precision, dtype: torch.dtype
) -> None:
    seen = set()
    teacher = nn.Linear(8, 2).eval()
    teacher.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    recipe = dataclasses.replace(RECIPE, epochs=1, precision=precision)
    losses = train(build(), dataset, recipe, seed=0, loss=distillation_loss(teacher, kd_ratio=0.5))
    assert seen == {dtype}
    assert all(parameter.dtype == torch.float32 for parameter in teacher.parameters())
    assert 0 < losses[0] < 2
