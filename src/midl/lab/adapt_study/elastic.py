"""One elastic network against networks made for one budget alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import midl
from midl.adaptation import refresh_normalization
from midl.adaptation.measure import dense_outputs
from midl.lab.adapt_study.batches import ShuffledBatches
from midl.lab.adapt_study.subject import Subject, distillation
from midl.lab.data import rows_for_all
from midl.lab.files import write_json
from midl.lab.measure import measure_accuracy

__all__ = ["BUDGETS", "run_elastic"]

BUDGETS = (0.25, 0.4, 0.55, 0.75, 1.0)


def run_elastic(
    subject: Subject,
    seed: int,
    folder: Path,
    *,
    group_size: int = 16,
    distil_epochs: int = 2,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Return a row per budget: accuracy of the elastic network and of one distilled at this budget alone.

    All start from the same conversion of the same dense network and are distilled for the same number of epochs; the
    elastic one's batch normalisations are refreshed for each budget.
    Finished rows are taken from ``folder``.

    Args:
        subject: data set and architecture.
        seed: of training.
        folder: of ``<subject>-elastic-seed<seed>.json``, the elastic and the dense networks.
        group_size: neurons selected together.
        distil_epochs: of every network.
        on_row: called with each row as it is done.
    """
    file = folder / f"{subject.name}-elastic-seed{seed}.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    dataset = subject.dataset
    dense = subject.train_dense(seed, folder)
    names = subject.architecture.layer_names
    start = copy.deepcopy(dense)
    midl.adapt(
        start, ShuffledBatches(dataset, seed), 1.7, group_size=group_size, allocation="uniform", light_alone=False,
        filter_fn=lambda module, name: name in names, seed=seed,
    )  # fmt: skip

    def distilled(**choices: Any) -> Any:
        model = copy.deepcopy(start)
        if (active := choices.pop("active", None)) is not None:
            midl.set_active(model, active)
        midl.adaptation.distil(
            model, dense, ShuffledBatches(dataset, seed), epochs=distil_epochs, seed=seed,
            **distillation(subject.recipes()), **choices,
        )  # fmt: skip
        return model

    known = [dataset.batch(dataset.train, part)[0] for part in rows_for_all(dataset.train.y, 2048).split(256)]
    outputs = dense_outputs(dense, known)
    saved = folder / f"{subject.name}-elastic-seed{seed}.safetensors"
    if saved.exists():
        elastic = midl.load_(copy.deepcopy(dense), saved).eval()
    else:
        elastic = distilled(elastic=(min(BUDGETS), max(BUDGETS)))
        midl.save(elastic, saved)
    for active in BUDGETS:
        if any(row["active"] == active for row in rows):
            continue
        midl.set_active(elastic, active)
        refresh_normalization(elastic, known, known, outputs)
        rows.append(
            {
                "dataset": subject.name,
                "seed": seed,
                "active": active,
                "epochs": distil_epochs,
                "dense": measure_accuracy(dense, dataset)[0],
                "elastic": measure_accuracy(elastic, dataset)[0],
                "alone": measure_accuracy(distilled(active=active), dataset)[0],
            }
        )
        write_json(file, rows)
        on_row(rows[-1])
    return rows
