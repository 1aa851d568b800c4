"""FFNs in an adaptation: found as blocks, calibrated on their inputs, and measured at several ranks and densities."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from midl.adaptation.batches import run
from midl.adaptation.between import fill_grid
from midl.adaptation.ffn import FFNFit
from midl.adaptation.group import order_neurons
from midl.adaptation.measure import output_error
from midl.adaptation.plan import ACTIVE, LIGHT_SHARES, Choice, interpolate
from midl.adaptation.replace import replaced
from midl.analysis.flops import evaluation_mode
from midl.config import MIDConfig, layer_macs
from midl.conversion.blocks import FFNBlock, absorb, make_ffn, parts_of, remember
from midl.conversion.convert import find_ffns
from midl.conversion.families import family_of
from midl.layers import MIDFFN

__all__ = ["Block", "BlockStart", "find_blocks_to_adapt", "group_units", "list_block_choices", "sample_inputs"]

_ROWS = 4096
_PER_BATCH = 1024


@dataclasses.dataclass(frozen=True)
class Block:
    """An FFN of the dense model: names and modules by role."""

    names: FFNBlock
    parts: Mapping[str, nn.Module]

    def sparse(self, config: MIDConfig) -> MIDFFN:
        """Return a MIDFFN with the block's weights that knows where they came from; light path and gate are empty."""
        ffn = make_ffn(self.parts, config)
        remember(ffn, self.names, self.parts)
        return ffn

    def replacements(self, ffn: MIDFFN) -> dict[int, nn.Module]:
        """Return what replaces the block's modules, by their ids."""
        return absorb(self.parts, ffn)

    def holds(self, parameters: Collection[int]) -> bool:
        """Return whether the block has one of the ``parameters``, given by their ids."""
        return any(id(p) in parameters for module in self.parts.values() for p in module.parameters())

    def ends(self) -> tuple[list[str], str]:
        """Return the names of the modules that may be called first, and that of the last."""
        return [self.names.roles[role] for role in ("up", "value") if role in self.names.roles], self.names.down

    def originals(self) -> dict[str, nn.Module]:
        """Return the block's modules by name."""
        return {name: self.parts[role] for role, name in self.names.roles.items()}


@dataclasses.dataclass(frozen=True)
class BlockStart:
    """A rank for one block, and the calibration from which its start at any density follows.

    It is for a block what :class:`midl.adaptation.Start` is for a layer.
    """

    fit: FFNFit
    rank: int
    group_size: int
    gate = "projection"

    def captured(self, active: float) -> tuple[float, float]:
        """Return the share of the held-out energy in the selected groups: by the gate, and by the best choice."""
        start = self.fit.start(self.rank, active)
        return start.captured, start.oracle

    def lost(self, active: float) -> float:
        """Return the relative squared error of the block's output on held-out rows."""
        return self.fit.start(self.rank, active).error

    def config(self, active: float) -> MIDConfig:
        """Return the configuration of a block that starts here."""
        return MIDConfig(active=active, rank=self.rank, group_size=self.group_size, interpolation="hard")

    def write(self, ffn: MIDFFN) -> None:
        """Set the light path and gate of ``ffn``, made with :meth:`config`, for its ``active``."""
        self.fit.start(self.rank, ffn.active).write(ffn)


def find_blocks_to_adapt(
    model: nn.Module, ffn: bool | Sequence[FFNBlock], group_size: int,
    filter_fn: Callable[[nn.Module, str], bool] | None, shared: set[int],
) -> tuple[dict[str, Block], dict[str, str]]:  # fmt: skip
    """Return the FFNs that can be converted, by the name of their first layer, and why others cannot."""
    found, reasons = {}, {}
    for block in find_ffns("adapt", model, ffn, shared)[0].values():
        parts = parts_of(model, block)
        name, linears = block.up, [parts[role] for role in ("up", "value", "down") if role in parts]
        hidden = Block(block, parts).sparse(MIDConfig(rank=1)).hidden_features
        if hidden % group_size:
            reasons[name] = f"group_size={group_size} does not divide its {hidden} hidden units"
        elif hidden == group_size:
            reasons[name] = f"group_size={group_size} leaves one group to choose from"
        elif filter_fn is not None and not filter_fn(linears[0], name):
            reasons[name] = "filter_fn returned False"
        else:
            found[name] = Block(block, parts)
    return found, reasons


@torch.no_grad()
def sample_inputs(
    model: nn.Module, blocks: Mapping[str, Block], batches: Sequence[Any], *, rows: int = _ROWS, seed: int = 0
) -> dict[str, Tensor]:
    """Return up to ``rows`` input rows of each block, a random part of every batch, while ``model`` evaluates them."""
    random = torch.Generator().manual_seed(seed)
    found: dict[str, list[Tensor]] = {name: [] for name in blocks}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            if len(x) > _PER_BATCH:
                x = x[torch.randperm(len(x), generator=random)[:_PER_BATCH].to(x.device)]
            found[name].append(x)

        return hook

    handles = [block.parts["up"].register_forward_pre_hook(keep(name)) for name, block in blocks.items()]
    try:
        with evaluation_mode(model):
            for batch in batches:
                run(model, batch)
                if all(sum(map(len, parts)) >= rows for parts in found.values()):
                    break
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts)[:rows] for name, parts in found.items() if parts}


@torch.no_grad()
def group_units(block: Block, inputs: Tensor, group_size: int) -> None:
    """Let hidden units change places, in the weights, so that those that matter together share a group.

    Nobody outside a block can see the order of its units: the output changes by rounding alone.
    """
    fit = FFNFit(block.sparse(MIDConfig(rank=1)), inputs)
    order = order_neurons(fit.energy, group_size)
    for role, module in block.parts.items():
        if role != "activation":
            transposed = family_of(module).name == "conv1d"  # type: ignore[union-attr]
            layer: Any = module
            rows = (role == "down") == transposed
            layer.weight.copy_(layer.weight[order] if rows else layer.weight[:, order])
            if role != "down" and layer.bias is not None:
                layer.bias.copy_(layer.bias[order])
    torch.clear_autocast_cache()  # which has the weights as they were


def list_block_choices(
    model: nn.Module, block: Block, inputs: Tensor, batches: Sequence[Any], expected: Sequence[Tensor], *,
    rows: int, group_size: int,
) -> list[Choice]:  # fmt: skip
    """Return the ways to run one block with what each costs and loses, dense first.

    Args:
        model: dense; left as it was.
        block: of the model.
        inputs: from :func:`sample_inputs`.
        batches: inputs of the model to measure on.
        expected: the model's outputs on them.
        rows: rows (positions) of the block on the first batch, in which the costs are counted.
        group_size: divides the hidden width.
    """
    plain = block.sparse(MIDConfig(rank=1, group_size=group_size))
    choices = [Choice(2 * rows * plain.dense_macs, 0.0)]
    if int(inputs.isfinite().all(-1).sum()) < 8:  # what cannot be judged stays dense
        return choices
    fit = FFNFit(plain, inputs)
    per_rank = plain.in_features + plain.out_features + plain.num_groups
    starts: dict[float, BlockStart] = {}
    for share in LIGHT_SHARES:
        rank = min(int(share * plain.dense_macs) // per_rank, plain.in_features, plain.out_features)
        if rank >= 1:
            starts[share] = BlockStart(fit, rank, group_size)
    listed = list(starts.values())

    def measure(i: int, j: int) -> float:
        ffn = block.sparse(listed[i].config(ACTIVE[j]))
        listed[i].write(ffn)
        with replaced(model, block.replacements(ffn)):
            return output_error(model, batches[: len(expected)], expected)

    left_out = [[start.lost(active) for active in ACTIVE] for start in listed]
    for (share, start), errors in zip(starts.items(), fill_grid(left_out, measure), strict=True):
        if not all(math.isfinite(error) for error in errors):  # overflow in half precision
            continue

        def macs(k: int, rank: int = start.rank) -> int:
            return layer_macs(
                plain.in_features, plain.hidden_features, rank, num_selected=k, group_size=group_size,
                gate="projection", neuron_macs=plain.dense_macs // plain.hidden_features,
                light_width=plain.out_features,
            )  # fmt: skip

        choices += [
            dataclasses.replace(choice, light_share=share)
            for choice in interpolate(start, errors, plain.num_groups, macs, rows)
        ]
    return choices
