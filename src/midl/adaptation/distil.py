"""distil: a converted model learns to give the dense model's answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midl.adaptation.batches import Data, batches_of, inputs_of, run
from midl.adaptation.outputs import hooked
from midl.budget import spread_active
from midl.checks import check_callable
from midl.config import check_active, check_positive_int
from midl.errors import MIDLError
from midl.layers import MIDLayer

__all__ = ["distil", "soft_cross_entropy", "squared_error"]

# Times a million and an epoch it is still a seed of torch's.
_LARGEST_SEED = 2**42

Loss = Callable[[Tensor, Tensor], Tensor]
"""Called with the student's output and the teacher's, or the labels; returns a scalar."""


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared error relative to the teacher's variance: for logits, embeddings and images alike.

    >>> squared_error(torch.zeros(2, 2), torch.tensor([[1.0, -1.0], [1.0, -1.0]])).item()
    1.0
    """
    return F.mse_loss(student, teacher) / teacher.var(correction=0).clamp(min=1e-12)


def soft_cross_entropy(temperature: float = 2.0) -> Loss:
    """Return KL(teacher || student) of softened class probabilities, times the squared temperature.

    >>> round(soft_cross_entropy()(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]])).item(), 6)
    0.0

    Source: G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.
    """

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        p, q = (F.log_softmax(logits / temperature, dim=-1).flatten(0, -2) for logits in (teacher, student))
        return F.kl_div(q, p, reduction="batchmean", log_target=True) * temperature**2

    return loss


def distil(
    student: nn.Module,
    teacher: nn.Module,
    data: Data,
    *,
    epochs: int = 1,
    first_epoch: int = 0,
    lr: float = 3e-4,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Loss = squared_error,
    task_loss: Loss | None = None,
    kd_ratio: float = 0.5,
    match: Sequence[str] = (),
    elastic: tuple[float, float] | None = None,
    autocast: torch.dtype | None = None,
    seed: int = 0,
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> list[float]:
    """Train ``student`` in place to give ``teacher``'s answers on ``data``; return the mean loss of every epoch.

    >>> import copy, midl
    >>> teacher = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    >>> student = copy.deepcopy(teacher)
    >>> _ = midl.convert_(student, midl.MIDConfig(group_size=8))
    >>> losses = distil(student, teacher, torch.randn(256, 16), epochs=3)
    >>> losses[-1] < losses[0]
    True

    To resume, save the student and the optimizer in ``on_epoch`` and call again with ``first_epoch``: the random
    choices and the default learning rate of an epoch depend on ``seed`` and the epoch alone. The order of the batches
    is that of ``data``.

    Args:
        student: the model to train, with MID-L layers or without; ends in evaluation mode.
        teacher: takes the same inputs; evaluated, not changed. Must not share parameters with ``student``.
        data: as for :func:`midl.adapt`; gone through once per epoch.
        epochs: the epoch to stop before; 0 trains nothing.
        first_epoch: the epoch to start with, for resuming.
        lr: the learning rate of the default optimizer, AdamW, with a cosine decay to zero. Convolutions learn faster
            at 1e-3.
        optimizer: of the student's parameters, instead; its learning rate is left alone.
        loss: between the two outputs.
        task_loss: between the student's output and the labels, such as ``nn.CrossEntropyLoss()``: the second element of
            every batch of ``data``, or its entry ``labels`` where batches are dicts. With labels a student can become
            better than its teacher. None: labels are not used.
        kd_ratio: share of ``loss`` in the sum with ``task_loss``, which has the rest.
        match: names of submodules, the same in both models, whose outputs should agree too; the mean of their squared
            errors is added to the loss.
        elastic: (low, high): every step draws the mean ``active`` of the layers from this range, half of them
            the low end, so that the weights serve all budgets in it (:func:`midl.set_active`). Layers with unequal
            ``active`` keep the proportions of their odds; each layer's own is restored afterwards. Batch normalisations
            end with the statistics of the mixture: take those of one budget with :func:`refresh_normalization`.
        autocast: dtype of mixed precision, such as torch.bfloat16.
        seed: of the elastic draws and the layers' noise; torch's random state is left as it was.
        on_epoch: called after every epoch with the epochs done and its mean loss.

    Raises:
        MIDLError: arguments that do not fit, or the loss became NaN or infinite.
    """
    check_training("distil", lr, kd_ratio, elastic, seed, loss=loss, task_loss=task_loss)
    layers = _check(student, teacher, epochs, first_epoch, match, elastic)
    parameters = [p for p in student.parameters() if p.requires_grad]
    if not parameters:
        raise MIDLError("distil: every parameter of the student is frozen, expected some with requires_grad")
    shared = {id(p) for p in teacher.parameters()} & {id(p) for p in parameters}
    if shared:
        raise MIDLError(
            "distil: teacher and student share parameters, expected a copy (copy.deepcopy before converting)"
        )
    batches = batches_of(data)
    scheduled = optimizer is None
    if scheduled:
        check_length("distil", batches)
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    configs = [layer.config for layer in layers]
    teacher_modes = [m for m in teacher.modules() if m.training]
    losses = []
    teacher.eval()
    student.train()
    try:
        for epoch in range(first_epoch, epochs):
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.manual_seed(seed * 1_000_003 + epoch)
                total, steps = 0.0, 0
                for steps, batch in enumerate(batches, start=1):
                    if scheduled:
                        progress = (epoch + (steps - 1) / len(batches)) / epochs  # type: ignore[arg-type]
                        for group in optimizer.param_groups:
                            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * progress))
                    if elastic is not None:
                        low, high = elastic
                        for layer, config in zip(layers, configs, strict=True):
                            layer.config = config
                        spread_active(layers, _draw(low, high))
                    value, output = _loss(student, teacher, inputs_of(batch), loss, match, autocast)
                    if task_loss is not None:
                        labels = _labels_of(batch).to(output.device)
                        value = kd_ratio * value + (1 - kd_ratio) * task_loss(output, labels)
                    optimizer.zero_grad(set_to_none=True)
                    value.backward()
                    optimizer.step()
                    total += value.item()
            if steps == 0:
                raise MIDLError("distil: data is empty in this epoch, expected batches that can be gone through again")
            if not math.isfinite(total):
                raise MIDLError(f"distil: the loss of epoch {epoch + 1} is {total / steps}, expected a finite one")
            losses.append(total / steps)
            on_epoch(epoch + 1, losses[-1])
    finally:
        for layer, config in zip(layers, configs, strict=True):
            layer.config = config
        for module in teacher_modes:
            module.training = True
        student.eval()
    return losses


def _draw(low: float, high: float) -> float:
    """Return a fraction of the range: for half of the draws the low end, which has most to learn.

    Source: the sandwich rule of "Universally Slimmable Networks", arXiv 1903.05134, with one width a step.
    """
    part = float(torch.rand(()))
    return low if part < 0.5 else low + (high - low) * (2 * part - 1)


def _loss(
    student: nn.Module, teacher: nn.Module, inputs: Any, loss: Loss, match: Sequence[str], autocast: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Return the distance of the two models' answers and the student's output."""
    seen: list[dict[str, Tensor]] = []

    def answer(model: nn.Module) -> Tensor:
        outputs: dict[str, Tensor] = {}
        seen.append(outputs)

        def keep(name: str, output: Tensor) -> None:
            outputs[name] = output

        with hooked({name: model.get_submodule(name) for name in match}, keep):
            return run(model, inputs)

    device = next(student.parameters()).device.type
    with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
        with torch.no_grad():
            expected = answer(teacher)
        actual = answer(student)
    actual = actual.float()
    value = loss(actual, expected.float())
    for name in match:
        value = value + squared_error(seen[1][name].float(), seen[0][name].float()) / len(match)
    return value, actual


def _labels_of(batch: Any) -> Tensor:
    """Return the second element of a batch, or a dict's entry ``labels``."""
    found = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    if isinstance(batch, Mapping):
        found = batch.get("labels")
    if isinstance(found, Tensor):
        return found
    raise MIDLError(
        f"distil: task_loss is given, but data has a batch of type {type(batch).__name__} without labels, expected "
        "(inputs, labels), or a dict with the entry 'labels'"
    )


def check_training(
    owner: str, lr: Any, kd_ratio: Any, elastic: Any, seed: Any, **functions: Any
) -> None:  # fmt: skip
    """Raise unless the choices of a distillation are what :func:`distil` takes; errors name ``owner``."""
    if not _is_number(lr) or not lr > 0:
        raise MIDLError(f"{owner}: lr={lr!r}, expected a number above 0")
    if not _is_number(kd_ratio) or not 0 <= kd_ratio <= 1:
        raise MIDLError(f"{owner}: kd_ratio={kd_ratio!r}, expected a share in [0, 1]")
    if not isinstance(seed, int) or isinstance(seed, bool) or not abs(seed) <= _LARGEST_SEED:
        raise MIDLError(f"{owner}: seed={seed!r}, expected an int of at most {_LARGEST_SEED}")
    if elastic is not None:
        if not isinstance(elastic, (tuple, list)) or len(elastic) != 2:
            raise MIDLError(f"{owner}: elastic={elastic!r}, expected (low, high)")
        for bound in elastic:
            check_active(f"{owner}: elastic", bound)
        if elastic[0] > elastic[1]:
            raise MIDLError(f"{owner}: elastic={elastic}, expected (low, high)")
    for name, function in functions.items():
        check_callable(owner, name, function)


def check_length(owner: str, data: Any) -> None:
    """Raise unless the number of batches is known, which the default learning rate needs."""
    try:
        len(data)
    except TypeError as error:
        raise MIDLError(
            f"{owner}: data has no length, expected one (or an optimizer, whose learning rate is then kept)"
        ) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check(
    student: nn.Module,
    teacher: nn.Module,
    epochs: int,
    first_epoch: int,
    match: Sequence[str],
    elastic: tuple[float, float] | None,
) -> list[MIDLayer]:
    if epochs != 0:
        check_positive_int("distil", "epochs", epochs, "an int of at least 0")
    if not 0 <= first_epoch <= epochs:
        raise MIDLError(f"distil: first_epoch={first_epoch}, expected 0 to epochs={epochs}")
    for model, owner in ((student, "student"), (teacher, "teacher")):
        known = dict(model.named_modules())
        for name in match:
            if name not in known:
                raise MIDLError(f"distil: match: the {owner} has no submodule {name!r}, expected a qualified name")
    layers = [m for m in student.modules() if isinstance(m, MIDLayer)]
    if elastic is not None and not any(layer.active for layer in layers):
        without = "has no MID-L layers" if not layers else "has only MID-L layers that are their light path alone"
        raise MIDLError(f"distil: elastic={elastic}, but the student, a {type(student).__name__}, {without}")
    return layers
