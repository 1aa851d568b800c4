"""``python -m midl.lab.adapt_study mnist --seed 0 --out FILE.json``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from midl.lab.adapt_study.study import Row, Settings, run_study
from midl.lab.data import load
from midl.lab.environment import describe_environment


def main() -> None:
    """Run the study on one data set and seed; print every row and write them all."""
    parser = argparse.ArgumentParser(description="Adapt a trained MLP to two budgets, beside low rank and the oracle.")
    parser.add_argument("dataset")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=Settings.epochs)
    parser.add_argument("--distil-epochs", type=int, default=Settings.distil_epochs)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    settings = Settings(seed=arguments.seed, epochs=arguments.epochs, distil_epochs=arguments.distil_epochs)
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(row)
        print(
            f"{arguments.dataset} {row.budget:g}x G={row.group_size} ({row.flops_ratio:.2f}x): dense {row.dense:.2f}, "
            f"low rank {row.low_rank:.2f} distilled {row.low_rank_distilled:.2f}, plain conversion {row.plain:.2f}, "
            f"adapted {row.adapted:.2f} oracle {row.oracle:.2f} distilled {row.distilled:.2f}",
            flush=True,
        )
        result = {
            "dataset": arguments.dataset, "settings": dataclasses.asdict(settings),
            "environment": describe_environment(), "rows": [dataclasses.asdict(r) for r in rows],
        }  # fmt: skip
        arguments.out.write_text(json.dumps(result, indent=1))

    run_study(load(arguments.dataset), settings, keep)


if __name__ == "__main__":
    main()
