"""The dense baselines: what a user has and the fastest dense kernels known here."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midl.lab.bench.contest import Contender, Contest, dense_contender
from midl.lab.bench.parity import Parity, compare_tensors

__all__ = [
    "add_dense_linears",
    "can_compile",
    "compile_frozen",
    "compile_trainable",
    "dense_count",
    "free_compiled",
    "pack_linear",
]

# One compiled graph per shape and copy, all from the same code object, is what we ask for.
_RECOMPILE_LIMIT = 256


def dense_count(compiling: bool) -> int:
    """Return how many dense contenders :func:`add_dense_linears` adds."""
    return 4 if compiling else 3


def add_dense_linears(
    contest: Contest, in_features: int, out_features: int, inputs: list[Tensor], *, compiling: bool
) -> None:
    """Add nn.Linear, F.linear, oneDNN with packed weights and the frozen compiled layer, each with its own weights."""
    copies, dtype = contest.cold.copies, inputs[0].dtype

    def layers() -> list[nn.Linear]:
        return [nn.Linear(in_features, out_features, dtype=dtype).eval().requires_grad_(False) for _ in range(copies)]

    def contender(name: str, of_layer: Callable[[nn.Linear], Callable[[Tensor], Tensor]]) -> Contender:
        dense = layers()
        calls = [of_layer(layer) for layer in dense]

        def check() -> Parity:
            layer, x = dense[0], inputs[0]
            assert layer.bias is not None
            expected = F.linear(x.float(), layer.weight.float(), layer.bias.float())
            return compare_tensors({"y": calls[0](x)}, {"y": expected}, dtype)

        return dense_contender(name, "nn.Linear", calls, inputs, check)

    contest.add("nn.Linear", lambda: contender("nn.Linear", lambda layer: layer))
    contest.add("F.linear", lambda: contender("F.linear", _functional))
    packed = functools.partial(pack_linear, batch=inputs[0].shape[0])
    contest.add("oneDNN packed", lambda: contender("oneDNN packed", packed))
    if compiling:
        contest.add(
            "compiled, frozen", lambda: contender("compiled, frozen", lambda layer: compile_frozen(layer, inputs[0]))
        )


def _functional(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight, bias = layer.weight, layer.bias
    return lambda x: F.linear(x, weight, bias)


def pack_linear(layer: nn.Linear, batch: int, *, gelu: bool = False) -> Callable[[Tensor], Tensor]:
    """Return ``layer``, with a GELU behind it if asked, as oneDNN's kernel on weights packed for ``batch`` rows."""
    weight, bias = torch.ops.mkldnn._reorder_linear_weight(layer.weight, batch), layer.bias
    attribute, algorithm = ("gelu", "none") if gelu else ("none", "")
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, attribute, [], algorithm)


def can_compile() -> bool:
    """Return whether torch.compile finds the C++ compiler that it needs on a CPU."""
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))


def compile_frozen(module: nn.Module, example: Tensor) -> Callable[..., Any]:
    """Return ``module`` compiled for inference on inputs like ``example``, its weights frozen into the graph.

    It checks nothing of what it is called with, which must be like ``example``, in the same grad mode.
    """
    return _compile(module, example, freezing=True)


def compile_trainable(module: nn.Module, example: Tensor) -> Callable[..., Any]:
    """Return ``module`` compiled for training; checked as little as `compile_frozen`'s.

    Its inputs must be like ``example`` and require a gradient.
    """
    return _compile(module, example.detach().clone().requires_grad_(), freezing=False)


def _compile(module: nn.Module, example: Tensor, *, freezing: bool) -> Callable[..., Any]:
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    def call(x: Tensor) -> Any:
        return module(x)

    # TorchDynamo keeps a code object's graphs in one list, and each call checks the guards of one after the other: with
    # code of its own none pays for the others, and without guards, like a program that was exported for serving, none
    # pays for its own.
    call.__code__ = call.__code__.replace()
    skip = getattr(torch.compiler, "skip_all_guards_unsafe", None)  # torch 2.6 and 2.7 have none
    options = {"guard_filter_fn": skip} if skip else None
    # One compile thread: worker processes would compete with what is timed.
    with inductor.patch(freezing=freezing, compile_threads=1), dynamo.patch(recompile_limit=_RECOMPILE_LIMIT):
        compiled: Callable[..., Any] = torch.compile(call, dynamic=False, options=options)
        compiled(example)
    return compiled


def free_compiled() -> None:
    """Drop compiled graphs and the weights frozen into them."""
    torch._dynamo.reset()
