"""convert_ and revert_: from a dense model to MID-L and back, in place."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import nn

from midl.analysis.flops import count_flops
from midl.checks import check_module
from midl.config import CONVERSION, MIDConfig
from midl.conversion.blocks import (
    FFNBlock,
    absorb,
    block_of,
    dense_parts,
    find_blocks,
    make_ffn,
    parts_of,
    remember,
    was_not_tried,
    why_no_ffn,
)  # fmt: skip
from midl.conversion.families import family_of, family_of_layer, has_hooks, why_not
from midl.conversion.report import ConversionReport, LayerChange
from midl.errors import MIDLError
from midl.layers import MIDFFN, Factors, MIDLayer
from midl.layers.ffn import DenseFFN

__all__ = ["convert_", "find_ffns", "make_layer", "own_parameters", "replace_modules", "revert_", "shared_parameters"]

Override = MIDConfig | Mapping[str, Any] | None


def convert_(
    model: nn.Module,
    config: MIDConfig | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    overrides: Mapping[str, Override] | None = None,
    ffn: bool | Sequence[FFNBlock] = False,
    example_inputs: Any = None,
) -> ConversionReport:
    """Replace the dense layers of ``model`` by MID-L layers, in place, and report what changed and what did not.

    Converted are nn.Linear, nn.Conv2d without groups, and transformers' Conv1D. Each MID-L layer keeps the very same
    weight and bias parameters (Conv1D's is transposed), so ties and optimizers hold on to them; its light path is the
    truncated SVD of the weight. A module used in several places is converted once. On an error the model is as before.

    >>> model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    >>> report = convert_(model, MIDConfig(group_size=16))
    >>> print(report.kept[0].name, report.kept[0].detail)
    2 group_size=16 does not divide out_features=10

    Args:
        model: any module that contains the layers; it must not itself be one.
        config: for every layer; default: the light gate and hard interpolation, which start closest to a
            trained network, else ``MIDConfig()``.
        filter_fn: called with (module, qualified name) for each layer that could be converted; False keeps it dense.
        overrides: from a qualified name or shell pattern (``"*.mlp.*"``) to a MIDConfig, to fields that replace those
            of ``config``, or to None (stay dense). The first entry that matches a layer counts. For a layer named
            here, a configuration that does not fit is an error rather than a reason to keep it dense.
        ffn: whether two-layer FFNs become :class:`midl.MIDFFN` blocks, which save in both layers. True: those that
            ``convert_`` recognises, by structure and by comparing outputs on random input, whatever their classes. Or
            name yours as :class:`midl.conversion.FFNBlock`. ``filter_fn`` and ``overrides`` know a block by its first
            layer; ``gate``, ``span`` and ``select`` of the configuration are for the other layers. In training, dropout
            between the two layers acts on the output instead.
        example_inputs: inputs of one forward call (a tensor, a tuple of arguments or a dict of keywords); if given, the
            report has the FLOPs of the whole model on them.

    Raises:
        MIDLError: nothing was converted, an override matches nothing or does not fit its layer, or a block that was
            named is no FFN.
    """
    config = config or CONVERSION
    if not isinstance(config, MIDConfig):
        raise MIDLError(f"convert_: config is a {type(config).__name__}, expected MIDConfig")
    _check_root(model)
    names = _names(model)
    chosen = _match_overrides(names, model, overrides or {})
    shared = shared_parameters(model)
    blocks, no_blocks = find_ffns("convert_", model, ffn, shared)
    replacements: dict[int, nn.Module] = {}
    changes: list[LayerChange] = []
    members: dict[int, str] = {}
    for name, module in own_parameters(model):
        count = _count_own(module)
        if id(module) in members:
            done = id(module) in replacements
            flops = (2 * module.weight.numel(), 0) if done else (0, 0)  # type: ignore[union-attr, operator]
            detail = f"in the FFN {members[id(module)]}"
            changes.append(
                LayerChange(name, type(module).__name__, done, detail, None, count, 0 if done else count, *flops)
            )
            continue
        block = blocks.get(id(module))
        override = chosen.get(id(module), config)
        parts: dict[str, nn.Module] = {}
        try:
            reason = None if block is not None else why_not(module, shared)
            if reason is None and override is None:
                reason = "kept dense by overrides"
            if reason is None and filter_fn is not None and not filter_fn(module, name):
                reason = "filter_fn returned False"
            if reason is None and block is not None:
                parts = parts_of(model, block)
                layer: Any = make_ffn(parts, _merge(config, override))
                remember(layer, block, parts)
            elif reason is None:
                layer = make_layer(module, _merge(config, override))
            if reason is None:
                layer.reset_light_path()
        except MIDLError as error:
            if id(module) in chosen:
                raise MIDLError(f"convert_: {name}: {error}") from error
            reason = str(error).partition(": ")[2]
        if block is not None:
            members.update({id(m): name for role, m in parts_of(model, block).items() if role != "up"})
        if reason is not None:
            changes.append(LayerChange(name, type(module).__name__, False, reason, None, count, count))
            continue
        replacements.update(absorb(parts, layer) if block is not None else {id(module): layer})
        changes.append(_describe(name, module, layer, no_blocks.get(name)))
    if not replacements:
        reasons = "; ".join(f"{c.name}: {c.detail}" for c in changes[:8]) or "it has no parameters"
        raise MIDLError(f"convert_: nothing in the {type(model).__name__} could be converted: {reasons}")
    return _apply(model, replacements, changes, example_inputs)


def revert_(model: nn.Module, *, example_inputs: Any = None) -> ConversionReport:
    """Replace the MID-L layers of ``model`` by plain dense layers with the very same weights, in place.

    >>> model = nn.Sequential(nn.Linear(64, 128), nn.ReLU())
    >>> weight = model[0].weight
    >>> _ = convert_(model)
    >>> _ = revert_(model)
    >>> model[0].weight is weight
    True

    Args:
        model: a model that contains MID-L layers; it must not itself be one.
        example_inputs: as for ``convert_``.

    Raises:
        MIDLError: the model has no MID-L layers.
    """
    if isinstance(model, MIDLayer):
        raise MIDLError(
            f"revert_: model is itself a {type(model).__name__} and cannot be replaced in place; "
            "use its to_linear(), to_conv2d() or to_dense()"
        )
    replacements: dict[int, nn.Module] = {}
    changes: list[LayerChange] = []
    for name, module in own_parameters(model):
        if isinstance(module, MIDLayer) and has_hooks(module):
            raise MIDLError(f"revert_: {name} has hooks, which going back would lose, expected them removed first")
        if isinstance(module, MIDFFN) and module.places is not None:
            dense_modules = dense_parts(model, name, module)
            replacements.update({id(model.get_submodule(n)): m for n, m in dense_modules.items()})
            changes += _describe_reverted_block(name, module, dense_modules)
        elif isinstance(module, MIDLayer):
            dense = family_of_layer(module).to_dense(module).train(module.training)
            replacements[id(module)] = dense
            forth = _describe(name, dense, module)
            changes.append(
                LayerChange(
                    name, type(module).__name__, True, f"-> {type(dense).__name__}", module.config,
                    forth.parameters_after, forth.parameters_before, forth.flops_after, forth.flops_before,
                )
            )  # fmt: skip
        else:
            count = _count_own(module)
            changes.append(LayerChange(name, type(module).__name__, False, "is no MID-L layer", None, count, count))
    if not replacements:
        raise MIDLError(f"revert_: the {type(model).__name__} has no MID-L layers")
    return _apply(model, replacements, changes, example_inputs)


def own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (qualified name, module) of each module that has parameters of its own, once, in the model's order.

    Factors are one module.
    """
    inside = {id(part) for module in model.modules() if isinstance(module, Factors) for part in module}
    for name, module in model.named_modules():
        own = any(True for _ in module.parameters(recurse=False)) or family_of(module) is not None
        if isinstance(module, Factors) or (own and id(module) not in inside):
            yield name, module


def replace_modules(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Put ``replacements`` (id of the old module to the new one) wherever the old ones stand in ``model``."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in replacements:
                setattr(parent, name, replacements[id(child)])
        for name, value in vars(parent).items():  # lists and dicts in which a model keeps an order of its layers
            if not name.startswith("_"):
                _replace_in(value, replacements)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            _set_fast_path(module)
        elif isinstance(module, nn.TransformerEncoder):
            _set_nested_tensors(module)


def _replace_in(container: Any, replacements: Mapping[int, nn.Module]) -> None:
    places: Any = ()
    if type(container) is list:
        places = enumerate(container)
    elif type(container) is dict:
        places = list(container.items())
    for place, value in places:
        if id(value) in replacements:
            container[place] = replacements[id(value)]


def _set_fast_path(layer: nn.TransformerEncoderLayer) -> None:
    """Keep torch's fused evaluation from reading the FFN's weights past a converted layer.

    In evaluation nn.TransformerEncoderLayer hands ``linear1.weight`` to one fused kernel; it does so only while
    ``activation_relu_or_gelu`` is 1 or 2.
    """
    kinds: dict[int, tuple[Any, type[nn.Module]]] = {1: (F.relu, nn.ReLU), 2: (F.gelu, nn.GELU)}
    layer.activation_relu_or_gelu = 0
    if not any(isinstance(m, (MIDLayer, Factors)) for m in layer.children()):
        for code, (function, cls) in kinds.items():
            if layer.activation is function or isinstance(layer.activation, cls):
                layer.activation_relu_or_gelu = code


def _set_nested_tensors(encoder: nn.TransformerEncoder) -> None:
    """Keep torch from packing padded sequences for the fused evaluation, which converted layers do not take part in."""
    if any(isinstance(m, (MIDLayer, Factors)) for m in encoder.modules()):
        if not hasattr(encoder, _NESTED):
            setattr(encoder, _NESTED, encoder.use_nested_tensor)
        encoder.use_nested_tensor = False
    elif hasattr(encoder, _NESTED):
        encoder.use_nested_tensor = getattr(encoder, _NESTED)
        delattr(encoder, _NESTED)


# What an encoder chose before it was converted.
_NESTED = "_midl_use_nested_tensor"


def _check_root(model: nn.Module) -> None:
    check_module("convert_", model)
    if family_of(model) is not None:
        raise MIDLError(
            f"convert_: model is itself a {type(model).__name__} and cannot be replaced in place; "
            "use MIDLinear.from_linear or MIDConv2d.from_conv2d"
        )


def _names(model: nn.Module) -> dict[int, list[str]]:
    """Return every qualified name of each module; a shared module has several."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


def _match_overrides(
    names: Mapping[int, list[str]], model: nn.Module, overrides: Mapping[str, Override]
) -> dict[int, Override]:
    """Return the override of each layer that one matches; a pattern that matches no dense layer is an error."""
    chosen: dict[int, Override] = {}
    layers = [m for _, m in own_parameters(model) if family_of(m) is not None]
    for pattern, override in overrides.items():
        matched = [m for m in layers if any(fnmatch.fnmatchcase(name, pattern) for name in names[id(m)])]
        if not matched:
            known = [names[id(m)][0] for m in layers]
            close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3) or known[:3]
            raise MIDLError(
                f"convert_: overrides: {pattern!r} matches no dense layer of the {type(model).__name__}; "
                f"expected a name or pattern like {close}"
            )
        for module in matched:
            chosen.setdefault(id(module), override)
    return chosen


def _merge(config: MIDConfig, override: Override) -> MIDConfig:
    if isinstance(override, MIDConfig):
        return override
    return config.replace(**(override or {}))


def shared_parameters(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that several modules hold."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    return {key for key, count in holders.items() if count > 1}


def make_layer(module: nn.Module, config: MIDConfig) -> MIDLayer:
    """Return the MID-L layer for a dense one, with its very weight and bias; light path and gate hold no values yet."""
    family = family_of(module)
    assert family is not None  # why_not has ruled this out
    layer = family.like(module, config)
    layer.dense_family = family.name
    kept = {id(p) for p in module.parameters(recurse=False)}
    for name, parameter in layer.named_parameters():
        if id(parameter) not in kept and name not in ("weight", "bias"):  # a frozen layer stays frozen
            parameter.requires_grad_(layer.weight.requires_grad)
    return layer


def find_ffns(
    owner: str, model: nn.Module, ffn: bool | Sequence[FFNBlock], shared: set[int]
) -> tuple[dict[int, FFNBlock], dict[str, str]]:
    """Return the blocks by the id of their first layer, and why layers that looked like blocks are none."""
    if not isinstance(ffn, (bool, Sequence)):
        raise MIDLError(f"{owner}: ffn is a {type(ffn).__name__}, expected a bool or a list of FFNBlock")
    if isinstance(ffn, bool):
        blocks, reasons = find_blocks(model, shared) if ffn else ([], {})
    else:
        blocks, reasons = list(ffn), {}
        for block in blocks:
            if not isinstance(block, FFNBlock):
                raise MIDLError(f"{owner}: ffn has a {type(block).__name__}, expected FFNBlock")
            reason = why_no_ffn(model, block, shared)
            if reason is not None and not was_not_tried(reason):
                raise MIDLError(f"{owner}: ffn: {block.up} is no FFN: {reason}")
    return {id(model.get_submodule(block.up)): block for block in blocks}, reasons


def _describe(name: str, dense: nn.Module, layer: MIDLayer, no_block: str | None = None) -> LayerChange:
    """Return the row for ``dense`` becoming ``layer``."""
    share = layer.num_selected / layer.num_groups
    detail = f"active {share:.3g} ({layer.num_selected} of {layer.num_groups} groups), rank {layer.rank}"
    before = layer.dense_macs
    if isinstance(layer, MIDFFN):
        detail = f"FFN: {detail}"
        before = before if isinstance(dense, DenseFFN) else dense.weight.numel()  # type: ignore[union-attr, operator, assignment]
    elif no_block is not None:
        detail = f"{detail}; no FFN: {no_block}"
    return LayerChange(
        name, type(dense).__name__, True, detail, layer.config, _count_own(dense), _count_own(layer), 2 * before,
        2 * layer.macs,
    )  # fmt: skip


def _describe_reverted_block(name: str, ffn: MIDFFN, dense: Mapping[str, nn.Module]) -> list[LayerChange]:
    """Return a row for each layer that a block goes back to."""
    rows = []
    for role, other in block_of(ffn, name).roles.items():
        if role != "activation":
            before, flops = (_count_own(ffn), 2 * ffn.macs) if role == "up" else (0, 0)
            layer: Any = dense[other]
            rows.append(
                LayerChange(
                    other, "MIDFFN", True, f"-> {type(layer).__name__}", ffn.config, before, _count_own(layer), flops,
                    2 * layer.weight.numel(),
                )
            )  # fmt: skip
    return rows


def _apply(
    model: nn.Module, replacements: Mapping[int, nn.Module], changes: list[LayerChange], example_inputs: Any
) -> ConversionReport:
    def measure() -> tuple[int, int | None]:
        flops = None if example_inputs is None else count_flops(model, example_inputs)
        return sum(p.numel() for p in model.parameters()), flops

    parameters_before, flops_before = measure()
    originals = {id(m): m for m in model.modules() if id(m) in replacements}
    replace_modules(model, replacements)
    try:
        parameters_after, flops_after = measure()
    except BaseException:
        replace_modules(model, {id(new): originals[old] for old, new in replacements.items() if old in originals})
        raise
    return ConversionReport(tuple(changes), parameters_before, parameters_after, flops_before, flops_after)


def _count_own(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters(recurse=isinstance(module, Factors)))
