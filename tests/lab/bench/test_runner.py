import dataclasses
import json
from pathlib import Path

import pytest
import torch

from midl.errors import MIDLError
from midl.lab.bench import list_benchmarks, run_bench
from midl.lab.bench.ceilings import Ceilings
from midl.lab.bench.registry import Case, all_cases, select_cases
from midl.lab.bench.results import Results, Row, read_results
from midl.ops.dispatch import selected_kernels

GROUPS = {
    "forward/float32", "forward/bfloat16", "efficiency/float32", "training/float32", "training/convolution",
    "selection/float32", "convolution/float32", "convolution/bfloat16", "scaling/density", "scaling/width",
    "scaling/group_size", "scaling/threads", "overhead", "memory/float32", "ffn/float32", "ffn/bfloat16",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the machine is the slow part and is tested on its own."""
    monkeypatch.setattr(
        "midl.lab.bench.runner.measure_ceilings",
        lambda quick: Ceilings(torch.get_num_threads(), 100.0, 80.0, 10.0, 20.0, "test"),
    )


def test_the_registry_lists_every_subject_once() -> None:
    names = [case.name for case in all_cases()]
    assert len(names) == len(set(names))
    assert {case.group for case in all_cases()} == GROUPS


def test_quick_touches_most_subjects_and_is_part_of_the_whole() -> None:
    quick = list_benchmarks(quick=True)
    assert set(quick) < set(list_benchmarks())
    assert {name.split("/")[0] for name in quick} == {group.split("/")[0] for group in GROUPS}


def test_only_takes_parts_of_names_patterns_and_lists() -> None:
    assert list_benchmarks("overhead") == ["overhead/256x256/batch1"]
    assert len(list_benchmarks("forward/float32/1024x1024/batch1")) == 1
    assert len(list_benchmarks("forward/*/1024x1024/*")) == 10
    assert len(list_benchmarks("overhead, scaling/width")) == 5
    with pytest.raises(MIDLError, match=r"only='nothing'.*forward/float32"):
        select_cases("nothing")


@pytest.mark.parametrize(
    "only",
    [
        "overhead",
        "selection/float32/1x32",
        "memory/float32/1024x1024/batch512",
        "convolution/float32/64x32x32/batch1",
        "ffn/float32/768x3072x768/batch1",
    ],
)
def test_a_run_writes_rows_that_read_back(only: str, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    before = torch.get_num_threads()
    results = run_bench(only, out=out, threads=1, compile=False)
    assert torch.get_num_threads() == before
    assert selected_kernels() == "auto"
    read = read_results(out)
    assert [dataclasses.asdict(row) for row in read.rows] == [dataclasses.asdict(row) for row in results.rows]
    assert read.machine["threads"] == 1
    assert read.rows
    assert not read.refused
    for row in read.rows:
        assert row.implementation
        assert row.memory or (row.over_user and row.over_best and row.times[row.contender]["median"] > 0)


def test_every_available_kernel_can_be_asked_for() -> None:
    results = run_bench("overhead", threads=1, compile=False, kernels=["all"])
    kernels = {row.params["kernels"] for row in results.rows}
    assert {"auto", "reference", "dense"} <= kernels
    assert {row.implementation for row in results.rows if row.params["kernels"] == "reference"} == {"reference"}


def test_the_higher_of_two_ceilings_counts_and_the_shares_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    ceilings = iter([Ceilings(1, None, 80.0, 10.0, 20.0, "first"), Ceilings(1, 200.0, 60.0, 10.0, 10.0, "second")])
    monkeypatch.setattr("midl.lab.bench.runner.measure_ceilings", lambda quick: next(ceilings))
    seen: list[float] = []

    def report(results: Results, case: Case, rows: list[Row]) -> None:
        seen.extend(row.roofline["share"] for row in rows if row.roofline)

    results = run_bench("selection/float32/1x32", threads=1, report=report)
    assert results.ceilings == Ceilings(1, 200.0, 80.0, 10.0, 20.0, "first").to_dict()
    # Selection is bound by memory, and the first reading was the higher one.
    assert [row.roofline["share"] for row in results.rows if row.roofline] == pytest.approx(seen)


@pytest.mark.parametrize(("kernels", "message"), [(["fast"], "name='fast'"), ([], "at least one")])
def test_impossible_kernels_are_an_error(kernels: list[str], message: str) -> None:
    with pytest.raises(MIDLError, match=message):
        run_bench("overhead", kernels=kernels)


def test_the_file_holds_what_was_finished_when_a_case_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = select_cases("overhead")[0]
    row = Row("overhead/x", "overhead", "midl", {}, "dense", {"ok": True, "error": 0.0}, "nn.Linear")

    def fail(session: object, case: object) -> list[Row]:
        raise KeyboardInterrupt

    cases = [dataclasses.replace(case, measure=lambda session, case: [row]), dataclasses.replace(case, measure=fail)]
    monkeypatch.setattr("midl.lab.bench.runner.select_cases", lambda only, quick: cases)
    with pytest.raises(KeyboardInterrupt):
        run_bench(out=tmp_path / "out.json")
    assert len(read_results(tmp_path / "out.json").rows) == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"version": 99}, "version 99"),
        ({"rows": [{"case": "x"}]}, "damaged"),
        ({"machine": None, "rows": None}, "damaged"),
    ],
)
def test_damaged_files_are_an_error(damage: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"version": 1, "machine": {}, "ceilings": {}, "settings": {}, "rows": [], **damage}))
    with pytest.raises(MIDLError, match=message):
        read_results(path)


def test_a_file_that_tells_a_speed_despite_red_parity_is_damaged(tmp_path: Path) -> None:
    spread = {"median": 2.0, "q1": 2.0, "q3": 2.0}
    row = Row("c", "g", "midl", {}, "native", {"ok": False, "error": 1.0}, "nn.Linear", over_user=spread)
    path = tmp_path / "bad.json"
    content = {"version": 1, "machine": {}, "ceilings": {}, "settings": {}, "rows": [dataclasses.asdict(row)]}
    path.write_text(json.dumps(content))
    with pytest.raises(MIDLError, match="parity"):
        read_results(path)
