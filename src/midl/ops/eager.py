"""The way of a plain eager call to its implementation, past torch's dispatcher.

torch's rule for custom ops looks up the schema again and again in every call that has gradients: some 0.3 ms for an op
with a dozen arguments, more than a small layer takes to compute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from midl.ops.dispatch import is_plain

__all__ = ["Op", "make_eager"]

Op = Callable[..., tuple[Tensor, Tensor]]


def make_eager(name: str, op: Any, forward: Op, setup_context: Callable[..., None], backward: Callable[..., Any]) -> Op:
    """Return a function that calls ``op``, or does what it does faster where nobody would notice.

    Args:
        name: of the op, for error messages and graphs.
        op: the registered one (torch.ops.midl...), from x, weight, ... to y and selected.
        forward: its kernel below autograd.
        setup_context: of its autograd rule.
        backward: of its autograd rule.
    """

    defaults = tuple(argument.default_value for argument in op.default._schema.arguments)

    def forward_and_save(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        output = forward(*args)
        setup_context(ctx, args, output)
        return output

    rule: Any = type(
        f"Eager{name.capitalize()}",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward_and_save), "backward": staticmethod(backward)},
    )

    def call(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        if not is_plain(x, weight):
            return op(x, weight, *args)
        if not torch.is_grad_enabled():
            return forward(x, weight, *args)
        return rule.apply(x, weight, *args, *defaults[len(args) + 2 :])

    return call
