"""``python -m midl.lab.adapt_study budgets cifar10 --seeds 0,1,2 --out FOLDER``."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from midl.lab.adapt_study.ablation import run_ablation
from midl.lab.adapt_study.elastic import run_elastic
from midl.lab.adapt_study.latency import run_latency
from midl.lab.adapt_study.render import render
from midl.lab.adapt_study.study import Settings, run_study
from midl.lab.adapt_study.subject import Subject, subject_for
from midl.lab.adapt_study.threshold import run_threshold
from midl.lab.data import load

_STUDIES = ("budgets", "latency", "elastic", "threshold", "scratch", "converted")


def main() -> None:
    """Run one study on one data set, seed by seed; print every row, keep all in the folder and go on from there."""
    parser = argparse.ArgumentParser(prog="python -m midl.lab.adapt_study", description=main.__doc__)
    parser.add_argument("study", choices=(*_STUDIES, "render"), help="scratch and converted are the ablation's halves")
    parser.add_argument("dataset", nargs="?", default="digits")
    parser.add_argument("--model", choices=["mlp", "cnn", "vgg"], help="instead of the data set's own architecture")
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas")
    parser.add_argument("--epochs", type=int, help="of the dense training; default: the recipe's")
    parser.add_argument("--further-epochs", type=int, default=0, help="of the dense training after a restart")
    parser.add_argument("--distil-epochs", type=int, help="of distillation, or of each of the ablation's variants")
    parser.add_argument("--budgets", default="1.7,2.5")
    parser.add_argument("--group-sizes", default="1,16,32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.study == "render":
        print(render(arguments.out))
        return
    subject = subject_for(load(arguments.dataset), arguments.model)
    subject = dataclasses.replace(subject, epochs=arguments.epochs, further=arguments.further_epochs)
    for seed in map(int, arguments.seeds.split(",")):
        _run(arguments, subject, seed, _print)


def _run(arguments: Any, subject: Subject, seed: int, on_row: Callable[[dict[str, Any]], None]) -> None:
    if arguments.study == "budgets":
        settings = Settings(
            budgets=tuple(map(float, arguments.budgets.split(","))),
            group_sizes=tuple(map(int, arguments.group_sizes.split(","))),
            distil_epochs=arguments.distil_epochs or Settings.distil_epochs, seed=seed,
        )  # fmt: skip
        run_study(subject, settings, arguments.out, on_row)
    elif arguments.study == "latency":
        run_latency(
            subject, seed, arguments.out, budgets=tuple(map(float, arguments.budgets.split(","))),
            group_sizes=tuple(map(int, arguments.group_sizes.split(","))), on_row=on_row,
        )  # fmt: skip
    elif arguments.study == "elastic":
        choices = {} if arguments.distil_epochs is None else {"distil_epochs": arguments.distil_epochs}
        run_elastic(subject, seed, arguments.out, on_row=on_row, **choices)
    elif arguments.study == "threshold":
        choices = {} if arguments.distil_epochs is None else {"distil_epochs": arguments.distil_epochs}
        budgets = tuple(map(float, arguments.budgets.split(",")))
        run_threshold(subject, seed, arguments.out, budgets=budgets, on_row=on_row, **choices)
    else:
        run_ablation(subject, seed, arguments.out, mode=arguments.study, epochs=arguments.distil_epochs, on_row=on_row)


def _print(row: dict[str, Any]) -> None:
    cells = (
        f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k not in ("layers", "latency")
    )
    print(", ".join(cells), flush=True)


if __name__ == "__main__":
    main()
