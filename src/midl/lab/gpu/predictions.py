"""Write the cost model's predictions: ``python -m midl.lab.gpu.predictions > docs/gpu_model.md``."""

from __future__ import annotations

from midl.analysis.gpu_model import latency_rows, layer_memory, make_call, win_rows
from midl.ops.gpu_cost import DEVICES, Device

__all__ = ["device_page"]

_HEAD = """# Where a GPU should win: a model

**Nothing on this page was measured.** It is what `midl.ops.gpu_cost` predicts from data sheets and the assumptions
listed in [GPU](gpu.md); command:

    python -m midl.lab.gpu.predictions > docs/gpu_model.md

float16, 45 % of the groups active, a rank that costs a tenth of the dense product, launches from a CUDA graph.
Speed-up: dense time over MID-L time, forward. Break-even: the largest active fraction, in steps of 0.05, that is
predicted to beat dense; 0 means none. Training: the same ratio for forward and backward together.
"""


def device_page(device: Device) -> str:
    """Return the tables of one device."""
    lines = [
        f"\n## {device.name}\n",
        f"{device.half_flops / 1e12:g} TFLOP/s float16, {device.memory_rate / 1e12:g} TB/s. Source: {device.source}.\n",
        "| layer | batch | group size | MID-L us | dense us | speed-up | break-even | training |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for row in win_rows(device):
        lines.append(
            f"| {row['in_features']} x {row['out_features']} | {row['batch']} | {row['group_size']} "
            f"| {row['microseconds']:.1f} | {row['dense_microseconds']:.1f} | {row['speedup']:.2f} "
            f"| {row['break_even']:.2f} | {row['training_speedup']:.2f} |"
        )
    return "\n".join(lines)


def _launches(device: Device) -> str:
    lines = [
        f"\n## Launch by launch: 4096 x 16384, {device.name}\n",
        "| batch, group size | layer | kernel | memory MB | GFLOP | us | bound by |",
        "| --- | --- | --- | --: | --: | --: | --- |",
    ]
    for rows, group_size in ((1, 32), (4096, 128)):
        for row in latency_rows(device, make_call(rows, 4096, 16384, group_size=group_size)):
            total = row["memory"] is None
            lines.append(
                f"| {rows}, {group_size} | {row['layer']} | {row['kernel']} "
                f"| {'' if total else format(row['memory'] / 1e6, '.2f')} "
                f"| {'' if total else format(row['flops'] / 1e9, '.2f')} "
                f"| {row['microseconds']:.1f} | {row['bound']} |"
            )
    return "\n".join(lines)


def _memory() -> str:
    lines = [
        "\n## Memory of a training step, MB\n",
        "`saved` lives from forward to backward beside weights and output; the workspaces only during a call.\n",
        "| layer, batch | group size | weights | saved | output | forward workspace | backward workspace | peak |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for rows, d, n, group_size in ((512, 1024, 4096, 32), (4096, 4096, 16384, 32), (4096, 4096, 16384, 128)):
        m = layer_memory(make_call(rows, d, n, group_size=group_size))
        values = (m.weights, m.saved, m.output, m.forward_workspace, m.backward_workspace, m.peak)
        cells = " | ".join(f"{value / 1e6:.1f}" for value in values)
        lines.append(f"| {d} x {n}, {rows} | {group_size} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Print the page."""
    parts = [
        _HEAD.rstrip(),
        *(device_page(device) for device in DEVICES.values()),
        _launches(DEVICES["h100"]),
        _memory(),
    ]
    print("\n".join(parts))


if __name__ == "__main__":
    main()
