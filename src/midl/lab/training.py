"""Training: one recipe for every method, deterministic, resumable after a kill at any moment."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midl.errors import MIDLError
from midl.lab.checkpoint import read_checkpoint, write_checkpoint
from midl.lab.data import Dataset
from midl.lab.processes import accelerator, share_rows

__all__ = ["Loss", "Precision", "Recipe", "cross_entropy", "seed_for", "train"]

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Called with inputs (rows, ...), the model's logits (rows, classes), float32, and labels (rows,); returns a scalar.
Networks that it runs itself run in the recipe's precision."""


Precision = Literal["no", "bf16"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """AdamW with a linear warm-up and a cosine decay to zero.

    Args:
        epochs: passes over the training rows.
        batch_size: rows per step; the last, smaller batch of an epoch is used too.
        lr: peak learning rate.
        weight_decay: of AdamW, on weight matrices; biases have none.
        warmup: fraction of all steps with rising learning rate.
        label_smoothing: share of each label that is spread over all classes; distillation does without.
        precision: ``"no"``: float32. ``"bf16"``: mixed, by torch.autocast.

    Raises:
        MIDLError: a value outside its range; the message names it.
    """

    epochs: int
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    label_smoothing: float = 0.0
    precision: Precision = "no"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise MIDLError(f"Recipe: {name}={getattr(self, name)!r}, expected at least 1")
        if not self.lr > 0:
            raise MIDLError(f"Recipe: lr={self.lr!r}, expected a number above 0")
        if not 0 <= self.warmup < 1:
            raise MIDLError(f"Recipe: warmup={self.warmup!r}, expected a fraction in [0, 1)")
        if not 0 <= self.label_smoothing < 1:
            raise MIDLError(f"Recipe: label_smoothing={self.label_smoothing!r}, expected a fraction in [0, 1)")
        if self.precision not in get_args(Precision):
            raise MIDLError(f"Recipe: precision={self.precision!r}, expected one of {get_args(Precision)}")

    def lr_at(self, step: int, steps: int) -> float:
        """Return the learning rate of step ``step`` of ``steps``.

        >>> recipe = Recipe(epochs=1, lr=1.0, warmup=0.5)
        >>> [round(recipe.lr_at(step, 4), 2) for step in range(4)]
        [0.5, 1.0, 1.0, 0.5]
        """
        rising = round(self.warmup * steps)
        if step < rising:
            return self.lr * (step + 1) / rising
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def cross_entropy(smoothing: float = 0.0) -> Loss:
    """Return the loss against the labels: the mean cross-entropy.

    >>> round(cross_entropy()(torch.zeros(2, 3), torch.zeros(2, 4), torch.tensor([0, 1])).item(), 4)
    1.3863
    """

    def loss(inputs: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)

    return loss


def seed_for(seed: int, epoch: int) -> int:
    """Return the random seed of one epoch: order and noise follow from it, so that resuming needs no random state."""
    return seed * 1_000_003 + epoch


def train(
    model: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    *,
    seed: int,
    loss: Loss | None = None,
    checkpoint: Path | None = None,
    before_step: Callable[[nn.Module], None] | None = None,
    on_step: Callable[[int, int], None] = lambda step, steps: None,
    on_epoch: Callable[[list[dict[str, Any]]], None] = lambda log: None,
) -> list[float]:
    """Train in place and return the mean loss of every epoch; leaves the model in evaluation mode on the CPU.

    The result depends on the model, the data, the recipe and the seed alone: a run that was killed and started again
    with the same ``checkpoint`` ends with the very same weights (same machine and thread count).

    Under ``accelerate launch`` or ``torchrun`` all processes call this with the same arguments. The batches are
    divided among them and gradients averaged, which gives the same result up to rounding, but for batch normalisation,
    whose statistics are each process's own. The first process writes the checkpoints.

    Args:
        model: freshly built, or the one to go on with; a checkpoint's weights replace its own.
        dataset: its training rows are used.
        recipe: how long and how fast.
        seed: decides the order of the rows and the exploration noise.
        loss: what to minimise; default: the cross-entropy with the recipe's label smoothing.
        checkpoint: file that is written after every epoch and resumed from where it exists.
        before_step: called with the model before every step; what it draws at random follows from the seed too.
        on_step: called after every step with the steps done and their total.
        on_epoch: called with one entry per finished epoch (epoch, loss, lr, seconds), at the start and after every
            epoch, when its checkpoint is written.

    Raises:
        CheckpointError: ``checkpoint`` is damaged or of another model.
        MIDLError: the loss became NaN or infinite.
    """
    rows = len(dataset.train)
    steps_per_epoch = -(-rows // recipe.batch_size)
    steps = recipe.epochs * steps_per_epoch
    place = accelerator()
    optimizer = _optimizer(model.to(place.device), recipe)
    loss = loss or cross_entropy(recipe.label_smoothing)
    log: list[dict[str, Any]] = []
    if checkpoint is not None and checkpoint.exists():
        log = read_checkpoint(checkpoint, model, optimizer)["log"]
    place.wait_for_everyone()
    on_epoch(log)
    model.train()
    network, optimizer = place.prepare(model, optimizer)
    mixed = torch.autocast(place.device.type, torch.bfloat16, enabled=recipe.precision == "bf16")
    for epoch in range(len(log), recipe.epochs):
        started = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(seed, epoch))
            total = 0.0
            for i, batch in enumerate(torch.randperm(rows).split(recipe.batch_size)):
                step = epoch * steps_per_epoch + i
                for group in optimizer.param_groups:
                    group["lr"] = recipe.lr_at(step, steps)
                if before_step is not None:
                    _draw(before_step, model, seed_for(seed, epoch) + step)
                mine, weight = share_rows(batch, place)
                inputs, labels = (t.to(place.device) for t in dataset.training_batch(mine))
                with mixed:
                    value = loss(inputs, network(inputs).float(), labels) * weight
                optimizer.zero_grad(set_to_none=True)
                place.backward(value)
                optimizer.step()
                total += value.item() * len(batch)
                on_step(step + 1, steps)
        total = place.reduce(torch.tensor(total, dtype=torch.float64), "mean").item()
        if not math.isfinite(total):
            raise MIDLError(
                f"train: the loss of epoch {epoch + 1} is {total}, expected a finite one (lower lr={recipe.lr:g})"
            )
        lr = recipe.lr_at((epoch + 1) * steps_per_epoch - 1, steps)
        seconds = round(time.perf_counter() - started, 3)
        log.append({"epoch": epoch + 1, "loss": total / rows, "lr": lr, "seconds": seconds})
        if checkpoint is not None and place.is_main_process:
            write_checkpoint(checkpoint, model, optimizer, {"log": log})
        on_epoch(log)
    model.cpu().eval()
    return [entry["loss"] for entry in log]


def _draw(before_step: Callable[[nn.Module], None], model: nn.Module, seed: int) -> None:
    """Call ``before_step`` with random numbers of its own, which are the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        before_step(model)


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=recipe.lr,
    )
