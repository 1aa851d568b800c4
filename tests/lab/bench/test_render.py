import io
from pathlib import Path

import pytest

from midl.lab.bench.console import Printer
from midl.lab.bench.registry import select_cases
from midl.lab.bench.render import render
from midl.lab.bench.results import Results, Row, write_results
from midl.lab.bench.summary import summarise


def row(group: str, size: str, best: float, *, contender: str = "midl G=32", **params: object) -> Row:
    spread = {"median": 1e-3, "q1": 0.9e-3, "q3": 1.1e-3}
    ratio = {"median": best, "q1": best - 0.1, "q3": best + 0.1}
    return Row(
        case=f"{group}/{size}",
        group=group,
        contender=contender,
        params={"group_size": 32, "active": 0.45, "kernels": "auto", **params},
        implementation="native",
        parity={"ok": True, "error": 1e-7, "limit": 1e-5, "detail": ""},
        user="nn.Linear",
        best="oneDNN packed",
        times={"nn.Linear": spread, "oneDNN packed": spread, contender: spread},
        over_user={"median": 2 * best, "q1": 2 * best, "q3": 2 * best},
        over_best=ratio,
        roofline={"gflops": 150.0, "gbs": 3.0, "bound": "compute", "share": 0.8},
        rounds=9,
    )


def refused(group: str, size: str) -> Row:
    parity = {"ok": False, "error": 0.3, "limit": 1e-5, "detail": "selection"}
    return Row(f"{group}/{size}", group, "midl G=1", {"group_size": 1}, "native", parity, "nn.Linear")


@pytest.fixture
def results() -> Results:
    machine = {
        "cpu": "Test CPU", "capability": "AVX2", "cores": 4, "threads": 2, "caches": {"L1": 32768, "L3": 2**25},
        "torch": "2.0", "python": "3.11", "midl": "0.1", "commit": "abc", "date": "2026-01-01", "load_average": [0.1],
    }  # fmt: skip
    ceilings = {
        "fma_gflops": 190.0, "gemm_gflops": 150.0, "gemm_bf16_gflops": 20.0, "read_gbs": 30.0, "read_by": "torch.sum",
    }  # fmt: skip
    settings = {"quick": False, "only": None, "kernels": ["auto"], "compile": True, "cold_bytes": 2**26}
    rows = [
        row("forward/float32", "1024x4096/batch1", 2.0, in_features=1024, out_features=4096, batch=1),
        row("forward/float32", "1024x4096/batch8", 0.5, in_features=1024, out_features=4096, batch=8),
        refused("forward/float32", "1024x4096/batch8"),
        row("scaling/density", "1024x4096/batch1", 1.5, active=0.3, batch=1),
    ]
    memory = row("memory/float32", "1024x4096/batch512", 1.0)
    memory.times, memory.over_user, memory.over_best, memory.roofline = {}, None, None, None
    memory.memory = {"nn.Linear": {"saved": 2**20, "peak": None}, "midl G=32": {"saved": 2**21, "peak": 2**22}}
    return Results(machine, ceilings, settings, [*rows, memory])


def test_summary_takes_the_geometric_mean_and_names_the_worst_cell(results: Results) -> None:
    first, second, third = summarise(results.rows)
    assert first.over_best == pytest.approx(1.0)
    assert first.over_user == pytest.approx(2.0)
    assert (first.worst_over_best, first.worst_case) == (0.5, "1024x4096/batch8")
    assert (second.contender, second.refused, second.over_best) == ("midl G=1", 1, None)
    assert third.group == "scaling/density"


def test_the_page_has_header_tables_plot_and_refusals(results: Results, tmp_path: Path) -> None:
    source, page = tmp_path / "benchmarks" / "test.json", tmp_path / "docs" / "benchmarks.md"
    write_results(source, results)
    written = render([source], page)
    assert written == [page, tmp_path / "docs" / "assets" / "benchmarks-test.svg"]
    text = page.read_text()
    assert "midl bench --threads 2 --out benchmarks/test.json" in text
    assert "Test CPU" in text
    assert "| 1024x4096/batch1 | midl G=32 | native | 1.00 ms | 1.00 ms, oneDNN packed |" in text
    assert "refused: parity 3.0e-01 > 1e-05" in text
    assert "2.00 MiB | 1.00 MiB | 4.00 MiB |  |" in text
    assert str(tmp_path) not in text


def test_rendering_twice_gives_the_same_bytes(results: Results, tmp_path: Path) -> None:
    source, page = tmp_path / "test.json", tmp_path / "page.md"
    write_results(source, results)
    first = [path.read_bytes() for path in render([source], page)]
    assert first == [path.read_bytes() for path in render([source], page)]


def test_a_file_without_the_plotted_groups_has_no_plot(results: Results, tmp_path: Path) -> None:
    results.rows = results.rows[-1:]
    source, page = tmp_path / "test.json", tmp_path / "page.md"
    write_results(source, results)
    assert render([source], page) == [page]
    assert "svg" not in page.read_text()


def test_the_console_refuses_to_tell_a_red_speed(results: Results) -> None:
    from rich.console import Console

    console = Console(width=200, file=io.StringIO(), record=True)
    printer = Printer(console)
    printer(results, select_cases("overhead")[0], results.rows)
    printer.finish(results)
    text = console.export_text()
    (line,) = [line for line in text.splitlines() if "REFUSED" in line]
    assert "3e-01 > 1e-05 selection" in line
    assert " s" not in line.replace(" selection", "")
    assert "oneDNN packed 1.00 ms (best)" in text
    assert "rows whose output differs from the reference's and that tell no speed: 1" in text
    assert "Test CPU" in text
