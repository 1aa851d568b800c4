"""Timing in pairs: who runs when, and what comes out."""

from __future__ import annotations

import time

from midl.lab.pairs import time_in_pairs


def test_every_call_is_timed_next_to_the_first_one_after_its_own_twin() -> None:
    seen: list[str] = []

    def recorder(name: str) -> tuple[object, object]:
        return lambda: seen.append(name), lambda: seen.append(f"{name} twin")

    times = time_in_pairs({name: recorder(name) for name in ("dense", "a", "b")}, rounds=6)  # type: ignore[misc]
    assert set(times) == {"dense", "a", "b"}
    timed = seen[-6 * 2 * 2 * 2 :]  # rounds, pairs, sides, twin and call
    assert timed[::2] == [f"{name} twin" for name in timed[1::2]]
    even, odd = ["a", "dense", "b", "dense"], ["dense", "a", "dense", "b"]
    assert timed[1::2] == (even + odd) * 3
    assert times["dense"]["ratio"] == times["dense"]["ratio_low"] == times["dense"]["ratio_high"] == 1
    for name in "ab":
        assert times[name]["ratio_low"] <= times[name]["ratio"] <= times[name]["ratio_high"]


def test_long_calls_need_no_twin_and_few_rounds_give_no_interval() -> None:
    seen: list[str] = []

    def long() -> None:
        seen.append("call")
        time.sleep(0.021)

    times = time_in_pairs(
        {"dense": (long, lambda: seen.append("twin")), "ours": (lambda: None, lambda: None)}, rounds=3
    )
    assert seen.count("twin") == 3
    assert times["dense"]["median"] >= 0.021
    assert set(times["ours"]) == {"median", "low", "high", "ratio"}
    assert times["ours"]["ratio"] < 1


def test_one_call_alone_is_its_own_measure() -> None:
    times = time_in_pairs({"dense": (lambda: None, lambda: None)}, rounds=6)
    assert times["dense"]["ratio"] == 1
