"""Forward pass of a transformer's FFN against two nn.Linear with an activation between: eager, oneDNN, compiled."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import midl
from midl.lab.bench.cases.forward import ACTIVE
from midl.lab.bench.contest import Contender, Contest, dense_contender, hold
from midl.lab.bench.dense import compile_frozen, free_compiled, pack_linear
from midl.lab.bench.midl_layers import check_ffn, contender_name, count_flops, implementation, make_ffn
from midl.lab.bench.parity import Parity, compare_tensors
from midl.lab.bench.registry import Case, register
from midl.lab.bench.results import Row
from midl.lab.bench.session import Session, fresh_inputs

__all__: list[str] = []

_GROUP_SIZES = (1, 16, 32)


@register
def cases() -> Iterator[Case]:
    """Yield FFNs of a small and of a large encoder, GELU, four times as wide inside, batch 1 to 128."""
    for dtype in (torch.float32, torch.bfloat16):
        for features in (768, 1024):
            for batch in (1, 16, 128):
                yield _case(features, 4 * features, batch, dtype)


def _case(features: int, hidden: int, batch: int, dtype: torch.dtype) -> Case:
    def measure(session: Session, case: Case) -> list[Row]:
        with torch.no_grad():
            inputs = fresh_inputs(batch, features, dtype=dtype)
            packed = functools.partial(_pack, batch=batch)
            contenders = len(_GROUP_SIZES) + (3 if session.compile else 2)
            bytes_of_one = 2 * features * hidden * dtype.itemsize
            contest = Contest(session.keep_cold(contenders * bytes_of_one), session.peak_gflops(dtype))
            contest.add("dense FFN", lambda: _dense(contest, "dense FFN", hidden, inputs, lambda ffn: ffn))
            contest.add("oneDNN packed", lambda: _dense(contest, "oneDNN packed", hidden, inputs, packed))
            if session.compile:
                compiled = functools.partial(compile_frozen, example=inputs[0])
                contest.add("compiled, frozen", lambda: _dense(contest, "compiled, frozen", hidden, inputs, compiled))
            for kernel in session.kernels:
                for group_size in _GROUP_SIZES:
                    name = contender_name(kernel, G=group_size, active=ACTIVE)
                    contest.add(name, functools.partial(_midl, contest, kernel, hidden, group_size, inputs))
            rows = hold(contest, session, case)
        if session.compile:
            free_compiled()
        return rows

    name = str(dtype).removeprefix("torch.")
    params = {"dtype": name, "in_features": features, "hidden_features": hidden, "batch": batch}
    return Case(
        f"ffn/{name}", f"{features}x{hidden}x{features}/batch{batch}", measure, (features, batch) == (768, 1), params
    )


def _pack(ffn: nn.Sequential, batch: int) -> Callable[[Tensor], Tensor]:
    up, down = ffn[0], ffn[2]
    assert isinstance(up, nn.Linear)
    assert isinstance(down, nn.Linear)
    first, second = pack_linear(up, batch, gelu=True), pack_linear(down, batch)
    return lambda x: second(first(x))


def _dense(
    contest: Contest, name: str, hidden: int, inputs: list[Tensor],
    of_ffn: Callable[[nn.Sequential], Callable[..., Tensor]],
) -> Contender:  # fmt: skip
    (_, features), dtype, copies = inputs[0].shape, inputs[0].dtype, contest.cold.copies

    def ffn() -> nn.Sequential:
        up, down = nn.Linear(features, hidden, dtype=dtype), nn.Linear(hidden, features, dtype=dtype)
        return nn.Sequential(up, nn.GELU(), down).eval().requires_grad_(False)

    ffns = [ffn() for _ in range(copies)]
    calls = [of_ffn(ffn) for ffn in ffns]

    def check() -> Parity:
        expected = copy.deepcopy(ffns[0]).float()(inputs[0].float())
        return compare_tensors({"y": calls[0](inputs[0])}, {"y": expected}, dtype)

    return dense_contender(name, "dense FFN", calls, inputs, check)


def _midl(contest: Contest, kernel: str, hidden: int, group_size: int, inputs: list[Tensor]) -> Contender:
    (batch, features), dtype = inputs[0].shape, inputs[0].dtype
    copies = contest.cold.copies
    layers = [make_ffn(features, hidden, active=ACTIVE, group_size=group_size, dtype=dtype) for _ in range(copies)]

    def prepare(i: int) -> tuple[midl.MIDFFN, Tensor]:
        midl.kernels(kernel)
        return layers[i % copies], inputs[i % len(inputs)].clone()

    layer = layers[0]
    wanted = 1 - (1 - layer.num_selected / layer.num_groups) ** batch
    full = layer.weight.numel() + layer.down_weight.numel()
    others = sum(p.numel() for p in layer.parameters()) - full
    return Contender(
        name=contender_name(kernel, G=group_size, active=ACTIVE),
        role="midl",
        prepare=prepare,
        call=lambda argument: argument[0](argument[1]),
        check=lambda: check_ffn(layer, inputs[0], kernel),
        flops=count_flops(lambda: layer(inputs[0])),
        read_bytes=dtype.itemsize * (wanted * full + others + 2 * batch * features),
        implementation=implementation(layer, inputs[0], kernel),
        params={"group_size": group_size, "active": ACTIVE, "rank": layer.rank, "kernels": kernel},
    )
