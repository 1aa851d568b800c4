"""Shared by the tests: the layer as a plain loop, random arguments for the ops, and comparisons.

The loop is written from design.md section 1 in Python floats, one row, one neuron and one multiplication at a time; it
shares no code, no tensor operation and no algebra with :mod:`midl.ops.reference`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

TENSORS = ("x", "weight", "bias", "light_down", "light_up", "gate_weight", "gate_bias")


@dataclasses.dataclass
class Options:
    """What the layer's formula depends on besides tensors."""

    k: int
    group_size: int = 1
    interpolation: str = "sigmoid"
    ste: str = "selected"
    threshold: float | None = None


def _sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v)) if v >= 0 else math.exp(v) / (1 + math.exp(v))


def _zeros(*shape: int) -> Any:
    return [_zeros(*shape[1:]) for _ in range(shape[0])] if len(shape) > 1 else [0.0] * shape[0]


def _dot(a: list[float], b: list[float]) -> float:
    return math.fsum(u * v for u, v in zip(a, b, strict=True))


def plain_rows(
    rows: list[list[float]],
    blocks: list[list[int]],
    tensors: dict[str, Any],
    options: Options,
    noise: list[list[float]] | None,
    grad_y: list[list[float]] | None,
) -> dict[str, Any]:
    """Compute the layer on ``rows``, the rows of each of ``blocks`` sharing one selection.

    ``tensors`` are nested lists. Returns ``y``, ``selected`` (per block) and, with ``grad_y``, the gradients by name.
    """
    weight, bias, down, up, gate_weight, gate_bias = (tensors[name] for name in TENSORS[1:])
    n, d, r, size = len(weight), len(weight[0]), len(down), options.group_size
    num_groups = n // size
    code = [[_dot(x, down[i]) for i in range(r)] for x in rows]
    light = [[_dot(z, up[j]) for j in range(n)] for z in code]
    full = [[_dot(x, weight[j]) for j in range(n)] for x in rows]

    y, selections, logits = _zeros(len(rows), n) if rows else [], [], []
    for b, block in enumerate(blocks):
        s = []
        for g in range(num_groups):
            if gate_weight is not None:
                mean_code = [math.fsum(code[p][i] for p in block) / len(block) for i in range(r)]
                s.append(_dot(mean_code, gate_weight[g]) + gate_bias[g])
            else:
                values = [
                    light[p][j] + (bias[j] if bias is not None else 0.0)
                    for p in block
                    for j in range(g * size, (g + 1) * size)
                ]
                s.append(math.fsum(values) / len(values))
        scores = s if noise is None else [v + e for v, e in zip(s, noise[b], strict=True)]
        best, *others = sorted(range(num_groups), key=lambda g: (-scores[g], g))[: options.k]
        chosen = sorted([best, *(g for g in others if options.threshold is None or scores[g] >= options.threshold)])
        selections.append(chosen + [-1] * (options.k - len(chosen)))
        logits.append(s)
        for p in block:
            for j in range(n):
                g = j // size
                ma = 0.0 if g not in chosen else _sigmoid(s[g]) if options.interpolation == "sigmoid" else 1.0
                y[p][j] = light[p][j] + ma * (full[p][j] - light[p][j]) + (bias[j] if bias is not None else 0.0)
    result: dict[str, Any] = {"y": y, "selected": selections}
    if grad_y is None:
        return result

    grads = {
        name: None if tensors[name] is None else torch.zeros(_shape(tensors[name])).tolist() for name in TENSORS[1:]
    }
    grad_x = _zeros(len(rows), d) if rows else []
    for block, chosen, s in zip(blocks, selections, logits, strict=True):
        grad_light = {p: [0.0] * n for p in block}
        grad_s = [0.0] * num_groups
        for p in block:
            for j in range(n):
                g, gy = j // size, grad_y[p][j]
                a = _sigmoid(s[g])
                ma = 0.0 if g not in chosen else a if options.interpolation == "sigmoid" else 1.0
                grad_full = gy * ma
                grad_light[p][j] += gy * (1 - ma)
                if bias is not None:
                    grads["bias"][j] += gy
                if g in chosen or options.ste == "dense":
                    grad_s[g] += gy * (full[p][j] - light[p][j]) * a * (1 - a)
                for i in range(d):
                    grads["weight"][j][i] += grad_full * rows[p][i]
                    grad_x[p][i] += grad_full * weight[j][i]
        grad_code = {p: [0.0] * r for p in block}
        for g in range(num_groups):
            if gate_weight is not None:
                grads["gate_bias"][g] += grad_s[g]
                for p in block:
                    for i in range(r):
                        grads["gate_weight"][g][i] += grad_s[g] * code[p][i] / len(block)
                        grad_code[p][i] += grad_s[g] * gate_weight[g][i] / len(block)
            else:
                for p in block:
                    for j in range(g * size, (g + 1) * size):
                        share = grad_s[g] / (len(block) * size)
                        grad_light[p][j] += share
                        if bias is not None:
                            grads["bias"][j] += share
        for p in block:
            for j in range(n):
                for i in range(r):
                    grads["light_up"][j][i] += grad_light[p][j] * code[p][i]
                    grad_code[p][i] += grad_light[p][j] * up[j][i]
            for i in range(r):
                for c in range(d):
                    grads["light_down"][i][c] += grad_code[p][i] * rows[p][c]
                    grad_x[p][c] += grad_code[p][i] * down[i][c]
    return {**result, "x": grad_x, **grads}


def _shape(nested: Any) -> tuple[int, ...]:
    return (len(nested), *_shape(nested[0])) if isinstance(nested, list) else ()


def _lists(tensors: dict[str, Tensor | None], rows_per_filter: bool) -> dict[str, Any]:
    """Return the weights as nested lists; filters of a convolution flattened to rows when asked."""
    out: dict[str, Any] = {}
    for name, t in tensors.items():
        if name != "x":
            flat = t.flatten(1) if t is not None and rows_per_filter and t.dim() > 2 else t
            out[name] = None if flat is None else flat.tolist()
    return out


def _runs(length: int, span: int) -> list[list[int]]:
    """Cut ``range(length)`` into runs of ``span``; the last may be short."""
    return [list(range(start, min(start + span, length))) for start in range(0, length, span)]


def _tensors(result: dict[str, Any], like: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Return nested-list gradients as float64 tensors shaped like the arguments."""
    return {
        name: torch.tensor(result[name], dtype=torch.float64).reshape(t.shape)
        for name, t in like.items()
        if t is not None and name in result
    }


def plain_linear(
    tensors: dict[str, Tensor | None], options: Options, span: int = 1, noise: Tensor | None = None,
    grad_y: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Compute ``midl::linear`` by loops; x is (..., T, d) and ``span`` runs along T."""
    x, weight = tensors["x"], tensors["weight"]
    assert x is not None
    assert weight is not None
    n, positions = weight.shape[0], x.shape[-2]
    rows = x.reshape(-1, x.shape[-1]).tolist()
    sequences = x.shape[:-2].numel()
    blocks = [[q * positions + p for p in run] for q in range(sequences) for run in _runs(positions, span)]
    result = plain_rows(
        rows, blocks, _lists(tensors, False), options,
        None if noise is None else noise.reshape(-1, noise.shape[-1]).tolist(),
        None if grad_y is None else grad_y.reshape(-1, n).tolist(),
    )  # fmt: skip
    per_sequence = len(_runs(positions, span))
    return {
        **_tensors(result, tensors),
        "y": torch.tensor(result["y"], dtype=torch.float64).reshape(*x.shape[:-1], n),
        "selected": torch.tensor(result["selected"], dtype=torch.int32).reshape(*x.shape[:-2], per_sequence, options.k),
    }


def plain_conv2d(
    tensors: dict[str, Tensor | None], options: Options, stride: tuple[int, int], padding: tuple[int, int],
    dilation: tuple[int, int], span: int = 1, noise: Tensor | None = None, grad_y: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Compute ``midl::conv2d`` by loops: every output position is a row, its receptive field; ``span=0`` per image."""
    x, weight = tensors["x"], tensors["weight"]
    assert x is not None
    assert weight is not None
    (batch, channels, height, width), (n, _, kh, kw) = x.shape, weight.shape
    out_h = len(range(0, height + 2 * padding[0] - dilation[0] * (kh - 1), stride[0]))
    out_w = len(range(0, width + 2 * padding[1] - dilation[1] * (kw - 1), stride[1]))
    values = x.tolist()
    rows, sources = [], []
    for b in range(batch):
        for oy in range(out_h):
            for ox in range(out_w):
                row, source = [], []
                for c in range(channels):
                    for ky in range(kh):
                        for kx in range(kw):
                            iy = oy * stride[0] - padding[0] + ky * dilation[0]
                            ix = ox * stride[1] - padding[1] + kx * dilation[1]
                            inside = 0 <= iy < height and 0 <= ix < width
                            row.append(values[b][c][iy][ix] if inside else 0.0)
                            source.append((b, c, iy, ix) if inside else None)
                rows.append(row)
                sources.append(source)
    lines = 1 if span == 0 else out_h
    along = out_h * out_w if span == 0 else out_w
    blocks = [[q * along + p for p in run] for q in range(batch * lines) for run in _runs(along, span or along)]
    result = plain_rows(
        rows, blocks, _lists(tensors, True), options,
        None if noise is None else noise.reshape(-1, noise.shape[-1]).tolist(),
        None if grad_y is None else grad_y.permute(0, 2, 3, 1).reshape(-1, n).tolist(),
    )  # fmt: skip
    if grad_y is not None:
        grad_x = torch.zeros(x.shape, dtype=torch.float64)
        for row_grad, source in zip(result.pop("x"), sources, strict=True):
            for value, index in zip(row_grad, source, strict=True):
                if index is not None:
                    grad_x[index] += value
        result["x"] = grad_x.tolist()
    y = torch.tensor(result["y"], dtype=torch.float64).reshape(batch, out_h, out_w, n).permute(0, 3, 1, 2)
    shape = (batch, 1, options.k) if span == 0 else (batch, out_h, len(_runs(out_w, span)), options.k)
    selected = torch.tensor(result["selected"], dtype=torch.int32).reshape(shape)
    return {**_tensors(result, tensors), "y": y, "selected": selected}


def random_tensors(
    x_shape: tuple[int, ...], weight_shape: tuple[int, ...], rank: int, group_size: int = 1, *,
    gate: str = "projection", bias: bool = True, dtype: torch.dtype = torch.float64, requires_grad: bool = False,
) -> dict[str, Tensor | None]:  # fmt: skip
    """Return arguments of an op by name: outputs of about unit size, logits well apart."""
    n, *fan_in_shape = weight_shape
    fan_in = math.prod(fan_in_shape)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype).requires_grad_(requires_grad)

    projection = gate == "projection"
    return {
        "x": draw(*x_shape),
        "weight": draw(*weight_shape, scale=fan_in**-0.5),
        "bias": draw(n) if bias else None,
        "light_down": draw(rank, *fan_in_shape, scale=fan_in**-0.5),
        "light_up": draw(n, rank, scale=rank**-0.5),
        "gate_weight": draw(n // group_size, rank, scale=rank**-0.5) if projection else None,
        "gate_bias": draw(n // group_size) if projection else None,
    }


def with_gradients(op: Any, tensors: dict[str, Tensor | None], *rest: Any, grad_y: Tensor) -> dict[str, Tensor]:
    """Call ``op(*tensors, *rest)`` and return y, selected and the gradients under ``grad_y``, by name."""
    leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in tensors.items()}
    y, selected = op(*leaves.values(), *rest)
    present = {name: t for name, t in leaves.items() if t is not None}
    grads = torch.autograd.grad(y, list(present.values()), grad_y)
    return {"y": y.detach(), "selected": selected, **dict(zip(present, grads, strict=True))}


def error_ratio(actual: Tensor, expected: Tensor) -> float:
    """Return the root-mean-square error of ``actual`` in units of ``expected``'s root-mean-square: free of scale."""
    actual, expected = actual.double(), expected.double()
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp_min(1e-30))


def assert_close_to_loop(actual: dict[str, Tensor], loop: dict[str, Tensor]) -> None:
    """Compare with the loop in float64: same selection, outputs to 1e-12, gradients to 1e-10."""
    assert torch.equal(actual["selected"], loop["selected"])
    torch.testing.assert_close(actual["y"], loop["y"], rtol=1e-12, atol=1e-12)
    for name in TENSORS:
        if name in loop:
            torch.testing.assert_close(
                actual[name], loop[name], rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"gradient of {name}: {m}"
            )


def instruction_sets_to_test() -> list[str]:
    """The instruction sets that this CPU runs; an emulated one only where the CPU lacks what it stands for."""
    from midl.ops import dispatch, native

    if dispatch.unavailable_reason("native"):
        return []
    supported = native.supported_instruction_sets()
    stands_for = {"avx512-emulated": "avx512bf16", "amx-emulated": "amx"}
    return [name for name in supported if stands_for.get(name) not in supported]
