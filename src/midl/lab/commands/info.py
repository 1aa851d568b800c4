"""``midl info``: what is installed here and what can run."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

__all__ = ["info"]


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts and bug reports.")] = False,
    device: Annotated[
        str | None, typer.Option(help="Print instead what the cost model predicts for a GPU: h100, a100, l4, rtx4090.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this CPU for the choice of kernels first, and keep the result.")
    ] = False,
) -> None:
    """Say what is installed, which kernels are available and why others are not, and where data comes from."""
    from midl.lab import environment
    from midl.lab.commands.errors import readable_errors

    if measure:
        from midl.ops.cpu_calibration import measure as measure_cpu

        with readable_errors("nothing was kept"):
            measure_cpu()
    if device is not None:
        _print_predictions(device, as_json)
        return
    facts: dict[str, Any] = {
        "versions": environment.describe_versions(),
        "commit": environment.describe_commit(),
        "machine": environment.describe_machine(),
        "kernels": environment.describe_kernels(),
        "auto": environment.describe_choice(),
        "extras": environment.describe_extras(),
        "data": environment.describe_data(),
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    _print_table(facts)


def _print_predictions(name: str, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from midl.analysis.gpu_model import device_named, win_rows
    from midl.lab.commands.errors import readable_errors

    with readable_errors("stopped"):
        device = device_named(name)
        rows = win_rows(device)
        if as_json:
            typer.echo(json.dumps({"model": True, "device": device.name, "rows": rows}, indent=2))
            return
        table = Table(title=f"{device.name}: a model from data sheets, nothing here was measured (docs/gpu.md)")
        for column in ("layer", "batch", "group", "MID-L µs", "dense µs", "ratio", "even", "train"):
            table.add_column(column, justify="left" if column == "layer" else "right", no_wrap=True)
        for row in rows:
            times = [f"{row[key]:.1f}" for key in ("microseconds", "dense_microseconds")]
            ratios = [f"{row[key]:.2f}" for key in ("speedup", "break_even", "training_speedup")]
            layer = f"{row['in_features']}x{row['out_features']}"
            table.add_row(layer, str(row["batch"]), str(row["group_size"]), *times, *ratios)
        Console().print(table)
        typer.echo("ratio: dense time over MID-L time; train: with backward; even: active where both are equal.")


def _print_table(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    kernels = {name: "available" if reason is None else f"no: {reason}" for name, reason in facts["kernels"].items()}
    extras = {
        name: "installed" if there else f"no: pip install 'midl[{name}]'" for name, there in facts["extras"].items()
    }
    data = facts["data"]
    mirror = data["problem"] or data["MIDL_DATA"] or "not set: data sets are downloaded"
    sections = {
        "versions": {name: version or "not installed" for name, version in facts["versions"].items()}
        | ({"commit": facts["commit"]} if facts["commit"] else {}),
        "machine": {name.replace("_", " "): value for name, value in facts["machine"].items()},
        "kernels": kernels,
        "auto": facts["auto"],
        "extras": extras,
        "data": {"MIDL_DATA": mirror, "cache": data["cache"], **data["sources"]},
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    for section, values in sections.items():
        for i, (name, value) in enumerate(values.items()):
            table.add_row(section if i == 0 else "", name, "none" if value is None else str(value))
        table.add_section()
    console = Console()
    console.print(table)
