"""One adaptation of one network: what ``midl adapt`` runs."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import torch

import midl
from midl.lab.adapt_study.batches import ShuffledBatches
from midl.lab.data import load
from midl.lab.environment import describe_environment
from midl.lab.measure import measure_accuracy, measure_latency
from midl.lab.models import architecture_for
from midl.lab.recipes import recipes_for
from midl.lab.training import train

__all__ = ["AdaptSettings", "adapt_once"]


@dataclasses.dataclass(frozen=True)
class AdaptSettings:
    """What to adapt; the fields are the options of ``midl adapt``."""

    dataset: str
    budget: float = 1.7
    group_size: int = 16
    epochs: int | None = None
    distil_epochs: int = 1
    seed: int = 0
    threads: int | None = None


def adapt_once(settings: AdaptSettings, out: Path, checkpoint: Path | None = None) -> Iterator[str]:
    """Train or load the data set's MLP, adapt it, write both and a report to ``out``; yield lines for the console.

    Raises:
        MIDLError: a data set, checkpoint or budget that cannot be had.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    dataset = load(settings.dataset)
    torch.manual_seed(settings.seed)
    dense = architecture_for(dataset.name, dataset.input_shape, dataset.num_classes).build()
    out.mkdir(parents=True, exist_ok=True)
    if checkpoint is None:
        recipe = recipes_for(settings.dataset, settings.epochs).train
        train(dense, dataset, recipe, seed=settings.seed)
        midl.save(dense, out / "dense.safetensors")
    else:
        midl.load_(dense, checkpoint)
    dense.eval()
    model = copy.deepcopy(dense)
    report = midl.adapt(
        model, ShuffledBatches(dataset, settings.seed), settings.budget, group_size=settings.group_size,
        epochs=settings.distil_epochs, seed=settings.seed,
    )  # fmt: skip
    midl.save(model, out / "adapted.safetensors")
    yield str(report)
    accuracy = {"dense": measure_accuracy(dense, dataset)[0], "adapted": measure_accuracy(model, dataset)[0]}
    yield f"accuracy {accuracy['dense']:.2f} % dense, {accuracy['adapted']:.2f} % adapted"
    latency = {}
    for batch in (1, 64):
        x = dataset.batch(dataset.test, slice(0, batch))[0]
        latency[batch] = measure_latency({"dense": dense, "adapted": model}, x)
        before, after = (latency[batch][name]["median"] for name in ("dense", "adapted"))
        yield f"latency at batch {batch}: {1e6 * before:.0f} us dense, {1e6 * after:.0f} us adapted"
    result = {
        "settings": dataclasses.asdict(settings), "environment": describe_environment(),
        "report": dataclasses.asdict(report), "accuracy": accuracy, "latency": latency,
    }  # fmt: skip
    (out / "report.json").write_text(json.dumps(result, indent=1))
    yield f"Folder: {out}"
