"""The constants of :mod:`midl.ops.cpu_cost` for this machine: built in, or measured once on demand and kept on disk.

Nothing is measured unless asked for (``midl info --measure``; ``midl bench`` asks where no measurement is there): a
first call that takes a second longer, or a choice that depends on what else ran in that second, is nobody's wish.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import midl
from midl.errors import MIDLError
from midl.machine import cache_path, processor_name
from midl.ops import native
from midl.ops.cpu_cost import ROWS, Constants, Rates, built_in
from midl.ops.native_packing import clear_packed

__all__ = ["constants", "measure", "measured"]

# Layers that rates are measured on: their weights stay in the cache, their products outweigh the call.
_SIZE, _RANK, _SHARE = 1024, 8, 0.45
_CHANNELS = 128
# Maps of as many pixels as ROWS says.
_MAPS = ((1, 1), (2, 4), (8, 8), (16, 16))
_TURNS = 9
# Times of one call that differ more, median over best, say more about the machine's other work than about the kernels.
_BUSY = 1.25
# A layer this large, in bytes, is seldom still in the cache when its turn comes again.
_CACHE = 2.0**21

_current: dict[tuple[str, int], Constants] = {}


def constants() -> Constants:
    """Return the constants for the instruction set and the number of threads in use.

    >>> constants().bandwidth > 0
    True
    """
    key = native.instruction_set(), torch.get_num_threads()
    if key not in _current:
        _current[key] = measured() or built_in(key[0])
    return _current[key]


def measured() -> Constants | None:
    """Return the constants that :func:`measure` has kept for this machine as it is now, or None.

    As it is: processor, instruction set, threads, versions of torch and midl, build of the kernels.
    """
    try:
        return Constants.from_dict(json.loads(_path().read_text())[_key()])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def measure() -> Constants:
    """Measure the constants with the present threads and instruction set, keep them on disk and use them from now on.

    Takes a few seconds of a machine that should have nothing else to do.

    Raises:
        MIDLError: the machine was too busy; nothing was kept.
        OSError: the cache folder cannot be written; the constants are used nevertheless.
    """
    products: dict[Any, _Products] = {
        (op, dtype): kind(dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for op, kind in (("linear", _LinearProducts), ("conv2d", _ConvolutionProducts))
    }
    tiny, sweep = (torch.randn(1, 16), torch.randn(16, 16)), torch.ones(2**24)
    calls: dict[Any, Callable[[], object]] = {
        "dense call": lambda: F.linear(*tiny),
        "sweep": sweep.sum,
        **{(key, *name): call for key, p in products.items() for name, call in p.calls.items()},
    }
    times = _best_nanoseconds(calls)
    rates = {
        key: p.rates({name[1:]: t for name, t in times.items() if name[0] == key}, times["dense call"])
        for key, p in products.items()
    }
    result = Constants(
        source=f"measured on {time.strftime('%Y-%m-%d')} with {torch.get_num_threads()} threads",
        float32=rates["linear", torch.float32],
        bfloat16=rates["linear", torch.bfloat16],
        convolution_float32=rates["conv2d", torch.float32],
        convolution_bfloat16=rates["conv2d", torch.bfloat16],
        bandwidth=round(sweep.nbytes / times["sweep"], 2),
        dense_call=round(times["dense call"]),
        cache=_CACHE,
    )
    _current[native.instruction_set(), torch.get_num_threads()] = result
    clear_packed()  # and with the panels the calls that were prepared by the old constants
    _keep(result)
    return result


class _Products:
    """Calls at each of ``ROWS`` rows: dense, and sparse with and without the full path.

    Attributes:
        neurons: of the layer.
        depth: of a neuron.
        calls: by form (``"dense"``, the group size, or less the group size where the full path is given) and rows.
    """

    neurons: int
    depth: int

    def __init__(self) -> None:
        self.calls: dict[tuple[str | int, int], Callable[[], object]] = {}

    def add(
        self, x: Tensor, rows: int, form: str | int, layer: tuple[Any, ...], *, dense: Callable[..., Tensor],
        sparse: Callable[..., object], options: tuple[Any, ...] = (),
    ) -> None:  # fmt: skip
        """Add the calls for one input: dense, or sparse with and without the full path."""
        product = functools.partial(dense, x, layer[0])
        if form == "dense":
            self.calls[form, rows] = product
            return
        assert isinstance(form, int)
        self.calls[form, rows] = functools.partial(sparse, x, *layer, *options)
        # What is left of a call that is given the full path is there on both sides.
        self.calls[-form, rows] = functools.partial(sparse, x, *layer, *options, full=product())

    def rates(self, times: dict[Any, float], dense_call: float) -> Rates:
        """Return the rates by the best times of the calls, in nanoseconds."""

        def dense(rows: int) -> float:
            whole = times["dense", rows]
            return rows * self.neurons * self.depth / max(whole - dense_call, whole / 4)

        def sparse(group_size: int, rows: int) -> float:
            whole, rest = times[group_size, rows], times[-group_size, rows]
            selected = _selected(self.neurons, group_size) * group_size
            return rows * selected * self.depth / max(whole - rest, whole / 4)

        def at_rows(rate: Callable[[int], float]) -> tuple[float, ...]:
            return tuple(float(f"{rate(rows):.4g}") for rows in ROWS)  # a slow one must not become zero

        return Rates(
            dense=at_rows(dense),
            single=at_rows(functools.partial(sparse, 1)),
            groups_of_16=at_rows(functools.partial(sparse, 16)),
            groups_of_32=at_rows(functools.partial(sparse, 32)),
        )


class _LinearProducts(_Products):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.neurons = self.depth = _SIZE
        weight = (torch.randn(_SIZE, _SIZE) / _SIZE**0.5).to(dtype)
        for form in _FORMS:
            layer = _layer(weight, (_SIZE,), form)
            for rows in ROWS:
                self.add(
                    torch.randn(rows, _SIZE).to(dtype), rows, form, layer, dense=F.linear, sparse=native.linear,
                    options=_options(_SIZE, form),
                )  # fmt: skip


class _ConvolutionProducts(_Products):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.neurons, self.depth = _CHANNELS, 9 * _CHANNELS
        window = ([1, 1], [1, 1], [1, 1])
        weight = (torch.randn(_CHANNELS, _CHANNELS, 3, 3) / self.depth**0.5).to(dtype)
        for form in _FORMS:
            layer = _layer(weight.contiguous(memory_format=torch.channels_last), (_CHANNELS, 3, 3), form)
            for rows, size in zip(ROWS, _MAPS, strict=True):
                x = torch.randn(1, _CHANNELS, *size).to(dtype).contiguous(memory_format=torch.channels_last)
                self.add(
                    x, rows, form, layer, dense=lambda x, weight: F.conv2d(x, weight, None, *window),
                    sparse=native.convolution, options=(*window, *_options(_CHANNELS, form)),
                )  # fmt: skip


_FORMS: tuple[str | int, ...] = ("dense", 1, 16, 32)


def _selected(neurons: int, group_size: int) -> int:
    return max(1, round(_SHARE * (neurons // group_size)))


def _layer(weight: Tensor, fan_in: tuple[int, ...], form: str | int) -> tuple[Any, ...]:
    """Return the parameters, from weight to noise; weights of their own, as panels are kept for one group size."""
    neurons = weight.shape[0]
    groups = neurons // form if isinstance(form, int) else neurons
    down, up = torch.randn(_RANK, *fan_in).to(weight), torch.randn(neurons, _RANK).to(weight)
    gate, bias = torch.randn(groups, _RANK).to(weight), torch.zeros(groups).to(weight)
    return weight.clone(), None, down, up, gate, bias, None


def _options(neurons: int, form: str | int) -> tuple[Any, ...]:
    return () if form == "dense" else (_selected(neurons, int(form)), int(form), 1, "sigmoid", "selected")


def _best_nanoseconds(calls: dict[Any, Callable[[], object]]) -> dict[Any, float]:
    """Return the best time of each call, all of them taken in turn; an error where others kept the processor busy."""
    times: dict[Any, list[int]] = {name: [] for name in calls}
    for turn in range(_TURNS + 2):  # the first two pack and warm up
        for name, call in calls.items():
            if not times[name] or times[name][-1] < 1e6:
                call()  # brings its data back into the cache
            start = time.perf_counter_ns()
            call()
            if turn >= 2:
                times[name].append(time.perf_counter_ns() - start)
    best = {name: float(min(taken)) for name, taken in times.items()}
    spread = statistics.median(statistics.median(taken) / best[name] for name, taken in times.items())
    if spread > _BUSY:
        raise MIDLError(
            f"measure: the same call takes {spread:.1f} times as long at one time as at another, expected at most "
            f"{_BUSY}: something else keeps this machine busy"
        )
    return best


def _path() -> Path:
    return cache_path() / "cpu-constants.json"


def _key() -> str:
    build = Path(str(native.extension().__file__)).stat()
    return " | ".join(
        [
            processor_name(), native.instruction_set(), f"{torch.get_num_threads()} threads",
            f"torch {torch.__version__}", f"midl {midl.__version__}", f"build {build.st_size}-{build.st_mtime_ns}",
        ]
    )  # fmt: skip


def _keep(result: Constants) -> None:
    """Write the constants beside those of other machines that share the cache folder."""
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = None
    known = known if isinstance(known, dict) else {}
    known[_key()] = result.to_dict()
    handle, temporary = tempfile.mkstemp(prefix=".cpu-constants.", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(known, file, indent=1)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
