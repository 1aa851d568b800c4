"""Make docs/benchmarks.md and its plots from the committed JSON.

The command is ``midl bench --render benchmarks``, or ``python -m midl.lab.bench.render benchmarks/*.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from midl.errors import MIDLError
from midl.lab.bench.machine import busy_machine
from midl.lab.bench.results import Results, Row, read_results
from midl.lab.bench.summary import format_ratio, format_roofline, format_seconds, summarise
from midl.lab.files import write_text

__all__ = ["render"]

_INTRO = """# Benchmarks

Generated from the JSON files in `benchmarks/` by `midl bench --render benchmarks`; do not edit.

Every time is that of the whole layer: code, light path, gate, selection, full path, interpolation and Python.
`nn.Linear` (or `nn.Conv2d`, `torch.topk`) is the layer as a user has it. **Best dense** is the fastest of that,
`F.linear`, oneDNN with packed weights and `torch.compile` with frozen weights, chosen per cell; for forward and
backward the fastest of eager and compiled. All contenders take turns in one process (ABC, BCA, CAB, ...); weights are
rotated, and where they are small other memory is read between rounds, so that at least twice the last-level cache is
read between two uses of the same weights. Inputs are fresh copies. Ratios are baseline time over ours, taken round by
round: the median, and the quartiles in brackets; calls that the scheduler interrupted are left out if three others
remain. Above 1 the layer is faster. A contender is timed only after its
output (and, for training, every gradient) matched the reference. `kernel` is the implementation that ran.

The roofline column gives the achieved rate and the share of the measured ceiling that binds: multiply-adds in registers
(or the largest matrix product) and bytes read per second. The work counted is what the formula needs: selected neurons,
light path and gate; bytes are the weights that at least one input selected, input and output. The `efficiency` cases
look at the full path alone: layers whose light path and gate cost next to nothing, and the work counted is that of the
selected neurons. The ceilings are the best that was measured at the start and at the end; on a shared machine the
bandwidth at hand is another every second, so at batch 1 `torch.sum` and `torch.max` read as many cold bytes, side by
side and in huge pages, in the same rounds: the share of that speed is the last figure.
"""


def render(paths: Sequence[Path], page: Path) -> list[Path]:
    """Write the page and one plot per file, beside it in ``assets``; return what was written.

    Args:
        paths: files that ``midl bench --out`` wrote.
        page: the Markdown file.

    Raises:
        MIDLError: no paths, or a file that is no benchmark file.
    """
    if not paths:
        raise MIDLError("render: paths=[], expected at least one JSON file that midl bench --out wrote")
    written, parts = [], [_INTRO]
    for path in sorted(paths):
        results = read_results(path)
        parts.append(_header(path, results))
        plot = page.parent / "assets" / f"benchmarks-{path.stem}.svg"
        if _plot(results.rows, plot):
            written.append(plot)
            parts.append(f"![Speed-up over best dense against density and batch](assets/{plot.name})\n")
        parts.append(_summary_table(results.rows))
        for group in dict.fromkeys(row.group for row in results.rows):
            parts.append(_group_table(group, [row for row in results.rows if row.group == group]))
    write_text(page, "\n".join(parts))
    return [page, *written]


def _header(path: Path, results: Results) -> str:
    machine, ceilings, settings = results.machine, results.ceilings, results.settings
    caches = ", ".join(f"{name} {size // 1024} KiB" for name, size in machine["caches"].items())
    command = ["midl bench", f"--threads {machine['threads']}"]
    command += ["--quick"] if settings["quick"] else []
    command += [f"--only '{settings['only']}'"] if settings["only"] else []
    command += [f"--kernels {name}" for name in settings["kernels"] if settings["kernels"] != ["auto"]]
    command += [] if settings["compile"] else ["--no-compile"]
    command += [f"--out {path.parent.name}/{path.name}"]
    fma = ceilings["fma_gflops"]
    page = machine.get("huge_page_bytes", 0)  # absent from older files
    lines = [
        f"## {path.stem}\n",
        f"    {' '.join(command)}\n",
        "| | |",
        "|---|---|",
        f"| processor | {machine['cpu']}, {machine['capability']}, {machine['cores']} cores; {caches}"
        f"{f'; kept panels in pages of {page // 2**20} MiB' if page else ''} |",
        f"| threads | {machine['threads']} |",
        f"| software | torch {machine['torch']}, Python {machine['python']}, midl {machine['midl']} at "
        f"{machine['commit']} |",
        f"| date | {machine['date']}, load average {machine['load_average'][0]} at the start |",
        f"| ceilings | {'not measured' if fma is None else f'{fma:.0f} GFLOP/s'} fp32 multiply-add; matrix products "
        f"{ceilings['gemm_gflops']:.0f} GFLOP/s fp32, {ceilings['gemm_bf16_gflops']:.0f} GFLOP/s bf16; memory read "
        f"{ceilings['read_gbs']:.1f} GB/s |",
        f"| cold | {settings['cold_bytes'] // 2**20} MiB read between two uses of the same weights |",
        f"| preempted | {100 * results.preempted:.0f} % of our timed calls |",
        "",
    ]
    if busy := busy_machine(machine):
        lines.append(f"**{busy.capitalize()}.**\n")
    return "\n".join(lines)


def _summary_table(rows: Iterable[Row]) -> str:
    lines = [
        "### Geometric means\n",
        "| group | contender | cells | over user's layer | over best dense | worst cell over best dense |",
        "|---|---|---|---|---|---|",
    ]
    for s in summarise(rows):
        user, best = (f"{ratio:.2f}" if ratio is not None else "" for ratio in (s.over_user, s.over_best))
        worst = f"{s.worst_over_best:.2f} ({s.worst_case})" if s.worst_over_best is not None else ""
        cells = f"{s.cells}, {s.refused} refused" if s.refused else str(s.cells)
        lines.append(f"| {s.group} | {s.contender} | {cells} | {user} | {best} | {worst} |")
    return "\n".join([*lines, ""])


def _group_table(group: str, rows: list[Row]) -> str:
    if any(row.memory for row in rows):
        return _memory_table(group, rows)
    lines = [
        f"### {group}\n",
        f"| case | contender | kernel | {rows[0].user} | best dense | ours | over {rows[0].user} | over best dense "
        "| roofline |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row.case.removeprefix(f'{group}/')} | {row.contender} | {row.implementation} |"
        if row.refused:
            lines.append(f"{start} refused: parity {row.parity['error']:.1e} > {row.parity['limit']:.0e} | | | | | |")
            continue
        user = format_seconds(row.times[row.user]["median"]) if row.user in row.times else ""
        best = f"{format_seconds(row.times[row.best]['median'])}, {row.best}" if row.best else ""
        ours = format_seconds(row.times[row.contender]["median"])
        ratios = f"{format_ratio(row.over_user)} | {format_ratio(row.over_best)}"
        lines.append(f"{start} {user} | {best} | {ours} | {ratios} | {format_roofline(row)} |")
    left_out = {f"{name} ({reason})": None for row in rows for name, reason in row.left_out.items()}
    return "\n".join([*lines, "", *(f"Left out: {text}.\n" for text in left_out)])


def _memory_table(group: str, rows: list[Row]) -> str:
    lines = [
        f"### {group}\n",
        "Bytes of one forward and backward pass: `saved` is kept from forward to backward, parameters left out; "
        "`peak` is resident memory above the state before, gradients included.\n",
        "| case | contender | kernel | saved | saved by the dense layer | peak | peak of the dense layer |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row.case.removeprefix(f'{group}/')} | {row.contender} | {row.implementation} |"
        if row.memory is None:
            lines.append(f"{start} refused: parity {row.parity['error']:.1e} > {row.parity['limit']:.0e} | | | |")
            continue
        cells = [row.memory[name][kind] for kind in ("saved", "peak") for name in (row.contender, row.user)]
        lines.append(f"{start} {' | '.join('' if c is None else f'{c / 2**20:.2f} MiB' for c in cells)} |")
    return "\n".join([*lines, ""])


def _plot(rows: list[Row], path: Path) -> bool:
    """Write the plot of speed-up over best dense against density and batch; return whether there was anything."""
    told = [row for row in rows if row.over_best is not None]
    density = [row for row in told if row.group == "scaling/density"]
    batches = [row for row in told if row.group == "forward/float32" and row.params["group_size"] == 32]
    if not density and not batches:
        return False
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "midl"  # the same rows give the same file
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for axis, lines, name in (
        (axes[0], _lines(density, "active", "batch"), "active fraction"),
        (axes[1], _lines(batches, "batch", "in_features", "out_features"), "batch"),
    ):
        for label, points in lines.items():
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set(xlabel=name, ylabel="speed-up over best dense", yscale="log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        if lines:
            axis.legend(fontsize="small")
    axes[0].set_title("1024x4096, G = 32, float32")
    axes[1].set_title("45 % active, G = 32, float32")
    axes[1].set_xscale("log", base=2)
    axes[1].xaxis.set_major_formatter("{x:g}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return True


def _lines(rows: list[Row], x: str, *labels: str) -> dict[str, list[tuple[float, float]]]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.over_best is None:
            continue
        sizes = "x".join(str(row.params[name]) for name in labels)
        label = sizes if len(labels) > 1 else f"{labels[0]} {sizes}"
        if row.params["kernels"] != "auto":
            label += f", {row.params['kernels']}"
        lines.setdefault(label, []).append((row.params[x], row.over_best["median"]))
    return {label: sorted(points) for label, points in lines.items()}


def main() -> None:
    """Run ``python -m midl.lab.bench.render``."""
    parser = argparse.ArgumentParser(description="Make the benchmark page from JSON files.")
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    arguments = parser.parse_args()
    for path in render(arguments.paths, arguments.page):
        print(path)


if __name__ == "__main__":
    main()
