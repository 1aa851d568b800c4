import time
from typing import Any, Literal

import pytest
import torch

from midl.errors import KernelError
from midl.lab.bench.ceilings import Ceilings
from midl.lab.bench.contest import Contender, Contest, hold
from midl.lab.bench.parity import Parity
from midl.lab.bench.reads import add_reads
from midl.lab.bench.registry import Case
from midl.lab.bench.session import Coldness, Session
from midl.ops.dispatch import selected_kernels

GREEN, RED = Parity(0.0, 1e-5), Parity(1.0, 1e-5)


@pytest.fixture
def session() -> Session:
    ceilings = Ceilings(1, 100.0, 80.0, 10.0, 20.0, "test")
    return Session(ceilings, seconds=0.0, min_rounds=3, cache=2**20)


def contender(name: str, role: Literal["user", "dense", "midl", "read"], parity: Parity, calls: list[str]) -> Contender:
    def call(_: Any) -> None:
        calls.append(name)

    return Contender(name, role, lambda i: i, call, lambda: parity, flops=1e6, read_bytes=1e6)


def run(session: Session, *contenders: Contender) -> Any:
    contest = Contest(session.keep_warm(), gflops=100.0, contenders=list(contenders))
    case = Case("group", "size", lambda session, case: [])
    return hold(contest, session, case)


def test_a_red_contender_of_ours_is_never_called_and_tells_no_speed(session: Session) -> None:
    calls: list[str] = []
    wrong, right = run(
        session,
        contender("nn.Linear", "user", GREEN, calls),
        contender("wrong", "midl", RED, calls),
        contender("right", "midl", GREEN, calls),
    )
    assert wrong.refused
    assert (wrong.times, wrong.over_user, wrong.over_best, wrong.roofline) == ({}, None, None, None)
    assert "wrong" not in calls
    assert not right.refused
    assert right.rounds == 3
    assert set(right.times) == {"nn.Linear", "right"}
    assert right.roofline["bound"] == "memory"


def test_a_red_dense_contender_cannot_be_the_best_and_the_reason_is_kept(session: Session) -> None:
    calls: list[str] = []
    (row,) = run(
        session,
        contender("nn.Linear", "user", GREEN, calls),
        contender("fast but wrong", "dense", RED, calls),
        contender("ours", "midl", GREEN, calls),
    )
    assert row.best == "nn.Linear"
    assert "parity is red" in row.left_out["fast but wrong"]
    assert "fast but wrong" not in calls


def test_a_plain_read_takes_part_but_is_no_baseline(session: Session) -> None:
    slow = Contender("nn.Linear", "user", lambda i: i, lambda _: time.sleep(1e-3), lambda: GREEN)
    ours = contender("ours", "midl", GREEN, [])
    (row,) = run(session, slow, ours, contender("read", "read", GREEN, []))
    assert set(row.times) == {"nn.Linear", "ours", "read"}
    assert row.times["read"]["median"] < row.times["nn.Linear"]["median"]
    assert row.best == "nn.Linear"
    assert row.of_read["median"] < row.over_best["median"]
    (row,) = run(session, slow, ours)
    assert row.of_read is None


def test_readers_take_as_many_copies_as_the_weights() -> None:
    contest = Contest(Coldness(copies=3, buffer=None), gflops=None)
    add_reads(contest, 1000, torch.bfloat16)
    for reader in contest.contenders:
        seen = [reader.prepare(i) for i in range(4)]
        assert len({t.data_ptr() for t in seen}) == 3
        assert all(t.shape == (1000,) and t.dtype == torch.bfloat16 for t in seen)
        reader.call(seen[0])


def test_what_this_machine_cannot_run_is_left_out_with_its_reason(session: Session) -> None:
    def build() -> Contender:
        raise RuntimeError("needs avx512\nlong trace")

    def refuse() -> Parity:
        raise KernelError("cannot take this call")

    contest = Contest(session.keep_warm(), gflops=None)
    contest.add("packed", build)
    contest.contenders += [
        contender("nn.Linear", "user", GREEN, []),
        Contender("forced", "midl", lambda i: i, lambda i: None, refuse),
        contender("ours", "midl", GREEN, []),
    ]
    (row,) = hold(contest, session, Case("group", "size", lambda session, case: []))
    assert row.contender == "ours"
    assert row.left_out == {"packed": "needs avx512", "forced": "cannot take this call"}
    assert row.roofline is None


def test_the_kernel_choice_is_restored(session: Session) -> None:
    import midl

    def prepare(_: int) -> None:
        midl.kernels("reference")

    ours = Contender("ours", "midl", prepare, lambda _: None, lambda: GREEN)
    with midl.kernels("dense"):
        run(session, contender("nn.Linear", "user", GREEN, []), ours)
        assert selected_kernels() == "dense"


def test_weights_are_cold_twice_the_cache_lies_between_two_uses(session: Session) -> None:
    for round_bytes in (1000, 2**18, 2**20, 2**23):
        cold = session.keep_cold(round_bytes)
        swept = 0 if cold.buffer is None else 4 * cold.buffer.numel()
        assert cold.copies * (round_bytes + swept) >= 2 * session.cache - 4 * cold.copies
    assert session.keep_cold(2**23).copies == 1


def test_ceilings_of_other_thread_counts_do_not_apply(session: Session) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert session.peak_gflops(torch.float32) == 100.0
        torch.set_num_threads(2)
        assert session.peak_gflops(torch.float32) is None
    finally:
        torch.set_num_threads(before)


def test_a_wrong_gradient_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    from midl.lab.bench.cases.training import check_training
    from midl.lab.bench.midl_layers import make_linear
    from midl.ops.dispatch import _implementation

    dense = _implementation("dense")
    right = dense.ops["linear_backward"]

    def wrong(*args: Any) -> Any:
        grads = list(right(*args))
        grads[3] = grads[3] * 1.001
        return tuple(grads)

    layer = make_linear(32, 64, torch.float32, active=0.5, group_size=8).requires_grad_().train()
    x, grad_y = torch.randn(9, 32), torch.randn(9, 64)
    assert check_training(layer, x, grad_y, "dense").ok
    monkeypatch.setitem(dense.ops, "linear_backward", wrong)
    parity = check_training(layer, x, grad_y, "dense")
    assert not parity.ok
    assert parity.detail == "light_down"


def test_training_rounds_look_like_new_steps() -> None:
    from midl.lab.bench.cases.training import prepare_step

    layer = torch.nn.Linear(4, 4)
    layer(torch.ones(1, 4)).sum().backward()
    before, version = layer.weight.clone(), layer.weight._version
    same, x = prepare_step([layer], [list(layer.parameters())], [torch.ones(1, 4)], 7)
    assert same is layer
    assert x.requires_grad
    assert layer.weight.grad is None
    assert layer.weight._version > version  # what is packed per version has to be packed again
    assert torch.equal(layer.weight, before)


def test_the_compiled_baseline_of_training_gives_its_input_a_gradient() -> None:
    from midl.lab.bench.dense import can_compile, compile_trainable, free_compiled

    if not can_compile():
        pytest.skip("no C++ compiler")
    layer, x = torch.nn.Linear(8, 4), torch.ones(2, 8)
    compiled = compile_trainable(layer, x)
    x.requires_grad_()
    compiled(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(2, 8))
    free_compiled()


@pytest.mark.slow
def test_compiled_baselines_join_and_agree(session: Session) -> None:
    from midl.lab.bench.cases.forward import forward_case
    from midl.lab.bench.cases.training import training_case

    for case in (forward_case("group", 48, 256, 3, groups=(8,)), training_case(48, 256, 3)):
        rows = case.measure(session, case)
        assert rows
        for row in rows:
            assert not row.refused
            assert any(name.startswith("compiled") for name in row.times)
