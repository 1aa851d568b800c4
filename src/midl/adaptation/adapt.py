"""adapt: from a trained model and a few batches of inputs to a MID-L model within a budget of FLOPs or of time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from midl.adaptation.batches import Data, collect, inputs_of, run, size_of
from midl.adaptation.blocks import find_blocks_to_adapt, group_units, list_block_choices, sample_inputs
from midl.adaptation.calibrate import calibrate, weight_of
from midl.adaptation.distil import Loss, check_length, check_training, distil, squared_error
from midl.adaptation.group import group_neurons
from midl.adaptation.latency import choose_by_latency
from midl.adaptation.measure import enough_outputs, output_error
from midl.adaptation.normalization import refresh_normalization
from midl.adaptation.outputs import hooked, to_rows
from midl.adaptation.plan import ActiveLimit, Plan, choose_by_flops, find_layers, list_choices
from midl.adaptation.replace import make_replacements
from midl.adaptation.report import AdaptedLayer, AdaptReport
from midl.adaptation.sensitivity import weigh_outputs
from midl.adaptation.threshold import calibrate_threshold
from midl.analysis.flops import count_flops, evaluation_mode
from midl.checks import check_callable, check_module, uncompiled
from midl.config import check_positive_int
from midl.conversion.blocks import FFNBlock
from midl.conversion.convert import replace_modules, shared_parameters
from midl.conversion.families import family_of
from midl.errors import MIDLError

__all__ = ["adapt", "check_max_active"]


def adapt(
    model: nn.Module,
    data: Data,
    budget: float = 1.7,
    *,
    latency_inputs: Any = None,
    group_size: int = 16,
    group: bool = True,
    allocation: str = "layerwise",
    light_alone: bool = True,
    max_active: float | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    ffn: bool | Sequence[FFNBlock] = False,
    samples: int = 2048,
    epochs: int = 0,
    lr: float = 3e-4,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    loss: Loss = squared_error,
    task_loss: Loss | None = None,
    kd_ratio: float = 0.5,
    elastic: tuple[float, float] | None = None,
    threshold: bool = False,
    seed: int = 0,
) -> AdaptReport:
    """Convert a trained model in place so that it needs ``budget`` times less and loses least; report how.

    Every layer is calibrated on the data, gets the light path and the gate that lose least there, and is measured at
    several ranks and densities; then the budget is divided among the layers so that the model's output changes
    least, and the result is, if asked, distilled against the dense model. Labels are not needed, and used only by
    ``task_loss``. Gradients are cleared. On an error the model is as before.

    >>> import midl, torch
    >>> model = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    >>> report = midl.adapt(model, torch.randn(512, 32), budget=1.7)
    >>> report.flops_ratio >= 1.7
    True

    With ``latency_inputs`` every way to run a layer is timed, and the budget is one of time: an adapted model that is
    ``budget`` times as fast as the dense one on inputs like these, on this machine, with torch's present threads and
    the kernels in force. What is not faster stays dense.

    Args:
        model: trained; nn.Linear, nn.Conv2d without groups and transformers' Conv1D are candidates.
        data: a tensor of inputs or an iterable of batches: a tensor, a dict of keyword arguments, or a tuple that
            starts with one of them (labels behind it are for ``task_loss``).
        budget: FLOPs of the whole model before, divided by those after, at least. With ``latency_inputs`` the median
            times instead, and up to 3 % less for the noise of timings.
        latency_inputs: one batch of the size that will be served, as those of ``data`` are; None: the budget counts
            FLOPs.
        group_size: neurons selected together; a layer whose width it does not divide stays dense.
        group: let neurons of a layer change places where nothing else can see it (in a plain nn.Sequential), so that
            those that matter together share a group. The weights then differ from the dense model's by that order.
        allocation: ``"layerwise"``: each layer its own density and rank, by what it loses; ``"uniform"``: the same
            density and the same share of light path for all, for comparison.
        light_alone: whether a layer may become its light path alone (``active=0``) where that loses least. With
            ``elastic`` or ``threshold`` none does: it would have nothing to choose.
        max_active: the largest share of the neurons that may be active, of all layers among which the budget is divided
            (hidden units of FFN blocks); a layer that stays dense has all of its own active. None: no limit.
        filter_fn: called with (module, qualified name); False keeps a layer dense.
        ffn: whether two-layer FFNs become :class:`midl.MIDFFN` blocks: True, or your own, as for :func:`midl.convert_`.
        samples: inputs to calibrate and measure on, from the start of ``data``.
        epochs: of distillation on all of ``data``; 0: none.
        lr: of the distillation, as for ``distil``.
        optimizer: from parameters to the optimizer of the distillation; default as for ``distil``.
        loss: of the distillation, between the outputs of the adapted and of the dense model.
        task_loss: of the distillation, between the output of the adapted model and the labels, as for ``distil``. None:
            labels are not used.
        kd_ratio: share of ``loss`` in the sum with ``task_loss``.
        elastic: range of ``active`` to distil for, as for ``distil``.
        threshold: let every input take as many groups as it needs, the budget on average over ``data``: gates are
            fitted so that the logits of different inputs compare, and :func:`calibrate_threshold` comes last.
        seed: of all random choices.

    Raises:
        MIDLError: data that does not fit the model, a budget or ``max_active`` that cannot be met (the message says the
            nearest that can), nothing to convert, or a distillation that diverges.
    """
    model = uncompiled(model)  # hooks would not be seen through what torch.compile made of it
    _check(model, data, budget, group_size, allocation, samples, epochs, latency_inputs, threshold, elastic, optimizer)
    check_max_active(max_active)
    check_training("adapt", lr, kd_ratio, elastic, seed, loss=loss, task_loss=task_loss)
    for name, value in (("optimizer", optimizer), ("filter_fn", filter_fn)):
        check_callable("adapt", name, value)
    budget = min(budget, 1e300)  # an int may be larger than any float
    served = None if latency_inputs is None else _check_served(model, latency_inputs)
    batches = collect(data, samples)
    alone = light_alone and elastic is None and not threshold
    layers, kept = find_layers(model, group_size, filter_fn)
    shared = shared_parameters(model)
    blocks, no_blocks = find_blocks_to_adapt(model, ffn, group_size, filter_fn, shared)
    for block in blocks.values():
        for name in block.originals():
            layers.pop(name, None)
            kept.pop(name, None)
    kept |= no_blocks
    names = [name for name, _ in model.named_modules() if name in layers or name in kept or name in blocks]
    inputs = sample_inputs(model, blocks, batches, seed=seed)
    for name in [name for name in blocks if name not in inputs]:
        del blocks[name]
        kept[name] = "not reached by the data"
    moments = calibrate(model, batches, layers)
    for name, found in moments.items():
        if found.rows == 0:
            del layers[name]
            kept[name] = f"all its {found.dropped} rows have NaN or Inf" if found.dropped else "not reached by the data"
    if not layers and not blocks:
        reasons = "; ".join(f"{name}: {kept[name]}" for name in names[:8]) or "it has no dense layers"
        raise MIDLError(f"adapt: nothing in the {type(model).__name__} could be converted: {reasons}")
    weigh_outputs(model, batches, layers, moments, seed=seed)
    expected = enough_outputs(model, batches)
    measured = batches[: len(expected)]
    dense_flops = count_flops(model, batches[0])
    # Whose neurons are chosen from.
    selecting = {**layers, **{name: block.parts["up"] for name, block in blocks.items()}}
    rows = _count_rows(model, selecting, batches[0])
    modes = {name: module.training for name, module in model.named_modules()}
    before = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
    gradients = {id(p): p.grad for p in model.parameters()}
    for p in model.parameters():
        p.grad = None  # or distillation would add to them
    try:
        regrouped = set()
        if group and group_size > 1:
            regrouped = group_neurons(model, layers, moments, batches, expected, group_size=group_size, seed=seed)
            for name, block in blocks.items():
                if not block.holds(shared):  # others would see the order of its units
                    group_units(block, inputs[name], group_size)
                    regrouped.add(name)
        choices = {
            name: list_choices(
                model,
                name,
                layer,
                moments[name],
                batches,
                expected,
                rows=rows[name],
                group_size=group_size,
                seed=seed,
                compare_rows=threshold,
                alone=alone,
            )
            for name, layer in layers.items()
        }
        for name, block in blocks.items():
            choices[name] = list_block_choices(
                model, block, inputs[name], batches, expected, rows=rows[name], group_size=group_size
            )
        uniform = allocation == "uniform"
        limit = None
        if max_active is not None:
            limit = ActiveLimit(max_active, {name: len(weight_of(module)) for name, module in selecting.items()})
        if served is None:
            plan = choose_by_flops(choices, dense_flops, budget, uniform=uniform, limit=limit)
        else:
            plan = choose_by_latency(model, layers, blocks, choices, served, budget, uniform=uniform, limit=limit)
        teacher = copy.deepcopy(model) if epochs else None
        replace_modules(model, make_replacements(layers, blocks, plan.chosen))
        refresh_normalization(model, batches, measured, expected)
        error = error_initialised = output_error(model, measured, expected)
        losses: list[float] = []
        if teacher is not None:
            losses = distil(
                model, teacher, data, epochs=epochs, lr=lr, loss=loss, task_loss=task_loss, kd_ratio=kd_ratio,
                elastic=elastic, seed=seed,
                optimizer=None if optimizer is None else optimizer(model.parameters()),
            )  # fmt: skip
            error = output_error(model, measured, expected)
        flops = count_flops(model, batches[0])
        thresholds = calibrate_threshold(model, batches, samples=samples) if threshold else None
        error = error if thresholds is None else output_error(model, measured, expected)
        for p in model.parameters():
            p.grad = None
    except BaseException:
        originals = [block.originals() for block in blocks.values()]
        _restore(model, {**layers, **{name: m for found in originals for name, m in found.items()}}, before)
        for p in model.parameters():
            p.grad = gradients.get(id(p))
        raise
    finally:
        for name, module in model.named_modules():
            module.training = modes.get(name, module.training)
    count = size_of(batches[0])
    dropped = {name: found.dropped for name, found in moments.items()}
    dropped |= {name: int((~x.isfinite().all(-1)).sum()) for name, x in inputs.items()}
    described = {
        name: _describe(name, plan, len(found), count, name in regrouped, dropped[name])
        for name, found in choices.items()
    }
    return AdaptReport(
        tuple(described.get(name) or AdaptedLayer(name, False, kept[name]) for name in names),
        dense_flops / count, flops / count, error_initialised, error, tuple(losses), thresholds,
        plan.latency_before, plan.latency_after,
    )  # fmt: skip


def check_max_active(value: object) -> None:
    """Raise unless ``value`` is one of :func:`adapt`'s ``max_active``."""
    if value is not None and not (isinstance(value, (int, float)) and 0 <= value <= 1):
        raise MIDLError(f"adapt: max_active={value!r}, expected None or a share of the neurons, from 0 to 1")


def _check(
    model: Any, data: Any, budget: Any, group_size: Any, allocation: Any, samples: Any, epochs: Any,
    latency_inputs: Any, threshold: bool, elastic: Any, optimizer: Any,
) -> None:  # fmt: skip
    check_module("adapt", model)
    if family_of(model) is not None:
        raise MIDLError(f"adapt: model is itself a {type(model).__name__}, expected a module that contains layers")
    if not isinstance(budget, (int, float)) or isinstance(budget, bool) or not budget > 1:
        kind = "FLOPs" if latency_inputs is None else "latency"
        raise MIDLError(f"adapt: budget={budget!r}, expected a {kind} ratio above 1")
    if latency_inputs is not None and threshold:
        raise MIDLError(
            "adapt: latency_inputs with threshold=True, expected one of them: with a threshold some inputs take longer "
            "than others, so that those given cannot speak for all"
        )
    check_positive_int("adapt", "group_size", group_size)
    if allocation not in ("layerwise", "uniform"):
        raise MIDLError(f"adapt: allocation={allocation!r}, expected 'layerwise' or 'uniform'")
    check_positive_int("adapt", "samples", samples)
    if elastic is not None and epochs == 0:
        raise MIDLError(f"adapt: elastic={elastic!r} with epochs=0, expected epochs to distil for")
    if epochs != 0:
        check_positive_int("adapt", "epochs", epochs, "an int of at least 0")
        if isinstance(data, Iterator):
            raise MIDLError(
                f"adapt: epochs={epochs} with data that can be gone through once, expected a list or loader"
            )
        if optimizer is None:
            check_length("adapt", data)
    if torch.is_inference_mode_enabled():
        raise MIDLError("adapt: called in inference mode, expected a place where gradients can be had")
    if any(t.is_inference() for t in (*model.parameters(), *model.buffers())):
        raise MIDLError("adapt: model has tensors made in inference mode, expected normal ones (build it outside)")


def _check_served(model: nn.Module, latency_inputs: Any) -> Any:
    """Return the inputs, which the model takes."""
    inputs = inputs_of(latency_inputs, "latency_inputs are")
    with evaluation_mode(model), torch.no_grad():
        run(model, inputs, "latency_inputs")
    return inputs


def _count_rows(model: nn.Module, layers: Mapping[str, nn.Module], batch: Any) -> dict[str, int]:
    """Return how many rows (positions) each layer computes on one batch."""
    rows = dict.fromkeys(layers, 0)

    def count(name: str, output: Tensor) -> None:
        rows[name] += len(to_rows(layers[name], output))

    with evaluation_mode(model), hooked(layers, count):
        run(model, batch)
    return rows


def _restore(model: nn.Module, layers: Mapping[str, nn.Module], before: list[tuple[Tensor, Tensor]]) -> None:
    """Put the very same dense layers back, with the values that their tensors had."""
    replaced = {}
    for name, dense in layers.items():
        current = model.get_submodule(name)
        if current is not dense:
            replaced[id(current)] = dense
    replace_modules(model, replaced)
    for tensor, value in before:
        if not torch._debug_has_internal_overlap(tensor):  # nobody can have written to an expanded one
            tensor.data.copy_(value)
    torch.clear_autocast_cache()


def _describe(name: str, plan: Plan, ways: int, inputs: int, regrouped: bool, dropped: int) -> AdaptedLayer:
    """Return the row of a layer that ``ways`` to run it, dense included, were measured of."""
    dense, choice = plan.choices[name][0], plan.chosen[name]
    times: tuple[float | None, float | None] = (None, None)
    if dense.nanoseconds is not None and choice.nanoseconds is not None:
        times = (dense.nanoseconds / 1e9, choice.nanoseconds / 1e9)
    if choice.start is None:
        if len(plan.choices[name]) > 1:
            reason = "dense is worth its FLOPs" if times[0] is None else "dense is worth its time"
        elif ways > 1 and times[0] is not None:
            reason = "nothing is faster on this machine"
        else:
            reason = "too small, or the model's output does not show it"
        return AdaptedLayer(
            name, False, reason, flops_before=dense.flops / inputs, flops_after=dense.flops / inputs,
            latency_before=times[0], latency_after=times[1],
        )  # fmt: skip
    captured, oracle = choice.start.captured(choice.active)
    return AdaptedLayer(
        name, True, "", choice.active, choice.start.rank, choice.start.gate, dense.flops / inputs,
        choice.flops / inputs, captured, oracle, regrouped, dropped, *times,
    )  # fmt: skip
