"""Timing in pairs: who runs when, and what comes out."""

from __future__ import annotations

import time
from collections.abc import Callable

from midl.lab.pairs import time_in_pairs


def test_every_call_is_timed_next_to_the_first_one_after_its_own_twin_and_they_take_turns() -> None:
    seen: list[str] = []

    def recorder(name: str) -> tuple[object, object]:
        return lambda: seen.append(name), lambda: seen.append(f"{name} twin")

    times = time_in_pairs({name: recorder(name) for name in ("dense", "a", "b")}, rounds=6)  # type: ignore[misc]
    assert set(times) == {"dense", "a", "b"}
    ran = seen[-6 * 2 * 2 * 2 :]  # rounds, pairs, sides, twin and call
    before, timed = ran[::2], ran[1::2]
    other = {name: f"{name} twin" for name in ("dense", "a", "b")}
    other |= {twin: name for name, twin in other.items()}
    assert before == [other[name] for name in timed]
    even, odd = ["a", "dense", "b", "dense"], ["dense", "a", "dense", "b"]
    assert [name.removesuffix(" twin") for name in timed] == (even + odd) * 3
    for name in ("dense", "a", "b"):
        own = [who for who in timed if who.startswith(name)]
        assert set(own[::2]) == {other[own[1]]}
        assert set(own[1::2]) == {own[1]}
    assert times["dense"]["ratio"] == times["dense"]["ratio_low"] == times["dense"]["ratio_high"] == 1
    for name in "ab":
        assert times[name]["ratio_low"] <= times[name]["ratio"] <= times[name]["ratio_high"]


def test_long_calls_need_no_twin_and_few_rounds_give_no_interval() -> None:
    seen: list[str] = []

    def long(name: str) -> Callable[[], None]:
        return lambda: (seen.append(name), time.sleep(0.021))[1]

    times = time_in_pairs({"dense": (long("call"), long("twin")), "ours": (lambda: None, lambda: None)}, rounds=4)
    assert seen[-4:] == ["twin", "call"] * 2
    assert len(seen) == 3 * 2 + 1 + 4  # to warm up, to see that it is long, one a round
    assert times["dense"]["median"] >= 0.021
    assert set(times["ours"]) == {"median", "low", "high", "ratio"}
    assert times["ours"]["ratio"] < 1


def test_one_call_alone_is_its_own_measure() -> None:
    times = time_in_pairs({"dense": (lambda: None, lambda: None)}, rounds=6)
    assert times["dense"]["ratio"] == 1


def test_rounds_end_by_number_or_by_time():
    calls = []

    def count(**limits):
        calls.clear()
        time_in_pairs({"dense": (lambda: calls.append(1), lambda: None)}, **limits)
        return len(calls)

    few = count(rounds=4, least=2, seconds=600)
    assert count(rounds=9, least=2, seconds=600) == few + 5 * (few - count(rounds=3, least=2, seconds=600))
    assert count(rounds=9, least=2, seconds=0) < few
