"""``midl::ffn`` as a plain loop: one row, one unit and one multiplication at a time, and random arguments for it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

TENSORS = (
    "x", "weight", "bias", "value_weight", "value_bias", "down_weight", "down_bias", "light_down", "light_up",
    "light_hidden", "light_bias", "gate_weight", "gate_bias",
)  # fmt: skip


def random_ffn(
    shape: tuple[int, ...], hidden: int, out: int, rank: int, group_size: int = 1, *, gated: bool = False,
    bias: bool = True, dtype: torch.dtype = torch.float64, requires_grad: bool = False,
) -> dict[str, Tensor | None]:  # fmt: skip
    """Return the op's tensors by name: outputs of about unit size, logits well apart."""
    d, groups = shape[-1], hidden // group_size

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, dtype=torch.float64) * scale).to(dtype).requires_grad_(requires_grad)

    return {
        "x": draw(*shape),
        "weight": draw(hidden, d, scale=d**-0.5),
        "bias": draw(hidden) if bias else None,
        "value_weight": draw(hidden, d, scale=d**-0.5) if gated else None,
        "value_bias": draw(hidden) if gated and bias else None,
        "down_weight": draw(out, hidden, scale=hidden**-0.5),
        "down_bias": draw(out) if bias else None,
        "light_down": draw(rank, d, scale=d**-0.5),
        "light_up": draw(out, rank, scale=rank**-0.5),
        "light_hidden": draw(hidden),
        "light_bias": draw(out),
        "gate_weight": draw(groups, rank, scale=rank**-0.5),
        "gate_bias": draw(groups),
    }


def _sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v)) if v >= 0 else math.exp(v) / (1 + math.exp(v))


def _activate(v: float, activation: str) -> float:
    if activation == "relu":
        return max(v, 0.0)
    if activation == "silu":
        return v * _sigmoid(v)
    if activation == "gelu":
        return 0.5 * v * (1 + math.erf(v / math.sqrt(2)))
    return 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))


def plain_ffn(
    tensors: dict[str, Tensor | None], k: int, group_size: int, activation: str, interpolation: str,
    noise: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Return y and selected of the FFN, (rows, ...), computed by loops over floats."""
    values: dict[str, Any] = {name: None if t is None else t.tolist() for name, t in tensors.items()}
    (
        x,
        weight,
        bias,
        value,
        value_bias,
        down,
        down_bias,
        to_code,
        light_up,
        light_hidden,
        light_bias,
        gate,
        gate_bias,
    ) = (values[name] for name in TENSORS)
    num_groups, outs, chosen_rows = len(gate), [], []

    def dot(a: list[float], b: list[float]) -> float:
        return math.fsum(u * v for u, v in zip(a, b, strict=True))

    for i, row in enumerate(x):
        code = [dot(row, direction) for direction in to_code]
        logits = [dot(code, gate[g]) + gate_bias[g] for g in range(num_groups)]
        scores = logits if noise is None else [s + e for s, e in zip(logits, noise[i].tolist(), strict=True)]
        chosen = sorted(sorted(range(num_groups), key=lambda g: (-scores[g], g))[:k])
        shares = [
            (_sigmoid(logits[g]) if interpolation == "sigmoid" else 1.0) if g in chosen else 0.0
            for g in range(num_groups)
        ]
        out = []
        for o in range(len(down)):
            light = dot(code, light_up[o])
            total = light + light_bias[o] + (0.0 if down_bias is None else down_bias[o])
            for g in range(num_groups):
                # A group is replaced as a whole: its units' light values and its part of the low-rank map.
                change = -light / num_groups
                for j in range(g * group_size, (g + 1) * group_size):
                    unit = _activate(dot(row, weight[j]) + (0.0 if bias is None else bias[j]), activation)
                    if value is not None:
                        unit *= dot(row, value[j]) + (0.0 if value_bias is None else value_bias[j])
                    change += (unit - light_hidden[j]) * down[o][j]
                total += shares[g] * change
            out.append(total)
        outs.append(out)
        chosen_rows.append(chosen)
    return {
        "y": torch.tensor(outs, dtype=torch.float64),
        "selected": torch.tensor(chosen_rows, dtype=torch.int32),
    }
