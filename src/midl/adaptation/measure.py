"""Measuring what a layer's selection costs the model: the error of the output with that one layer made sparse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from midl.adaptation.batches import run, size_of
from midl.adaptation.calibrate import without_bias
from midl.adaptation.initialise import Start
from midl.adaptation.outputs import from_rows, hooked, to_rows
from midl.analysis.flops import evaluation_mode
from midl.config import num_active_groups
from midl.selection import selection_mask, topk_groups

__all__ = ["dense_outputs", "enough_outputs", "output_error", "simulate"]

# Inputs to measure on, or outputs: rows (of images or tokens) and numbers in all.
_INPUTS = 512
_ROWS = 64
_ELEMENTS = 16384


@torch.no_grad()
def dense_outputs(model: nn.Module, batches: Sequence[Any]) -> list[Tensor]:
    """Return the model's output on every batch, in evaluation mode."""
    with evaluation_mode(model):
        return [run(model, batch) for batch in batches]


@torch.no_grad()
def enough_outputs(model: nn.Module, batches: Sequence[Any]) -> list[Tensor]:
    """Return the model's output on the first batches, in evaluation mode: on as many as tell errors apart.

    That is 512 inputs, or fewer where each has many outputs: the logits of a vocabulary at every token, an embedding.
    """
    outputs: list[Tensor] = []
    inputs = rows = 0
    for batch in batches:
        outputs += dense_outputs(model, [batch])
        inputs += size_of(batch)
        rows += len(_rows(outputs[-1]))
        if inputs >= _INPUTS or (rows >= _ROWS and sum(t.numel() for t in outputs) >= _ELEMENTS):
            break
    return outputs


@torch.no_grad()
def output_error(model: nn.Module, batches: Sequence[Any], expected: Sequence[Tensor]) -> float:
    """Return the mean square of (output - expected) relative to the variance of ``expected``, over its finite rows.

    0: the outputs are equal. 1: as wrong as the mean output.
    """
    target = torch.cat([_rows(t) for t in expected]).double()
    actual = torch.cat([_rows(t) for t in dense_outputs(model, batches)]).double()
    good = target.isfinite().all(-1)
    variance = (target[good] - target[good].mean(0)).square().mean()
    error = (actual[good] - target[good]).square().mean()
    return float(error / variance.clamp(min=1e-30))


def _rows(output: Tensor) -> Tensor:
    return output.reshape(-1, output.shape[-1]) if output.dim() else output.reshape(1, 1)


def simulate(
    model: nn.Module, layers: Mapping[str, nn.Module], starts: Mapping[str, tuple[Start, float]],
    batches: Sequence[Any], expected: Sequence[Tensor],
) -> float:  # fmt: skip
    """Return the output error with some dense ``layers`` made sparse, without converting them.

    Args:
        model: dense; left as it was.
        layers: name to dense layer.
        starts: name to the layer's start and active fraction.
        batches: inputs.
        expected: the dense outputs.
    """

    def make_sparse(name: str, output: Tensor) -> Tensor:
        start, active = starts[name]
        layer = layers[name]
        rows = to_rows(layer, output)
        full = without_bias(layer, rows)
        code = full @ start.light_path.reader.T.to(full.dtype)
        light = code @ start.light_path.up.T.to(full.dtype)
        scores = code @ start.gate_weight.T.to(full.dtype) + start.gate_bias.to(full.dtype)
        num_groups = scores.shape[-1]
        if not active:
            return from_rows(layer, light + (rows - full), output)
        mask = selection_mask(topk_groups(scores, num_active_groups(active, num_groups)), num_groups)
        change = torch.where(mask.repeat_interleave(start.group_size, dim=-1), 0, light - full)
        return from_rows(layer, rows + change, output)

    with hooked({name: layers[name] for name in starts}, make_sparse):
        return output_error(model, batches, expected)
