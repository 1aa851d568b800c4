"""The export: a sweep that goes on elsewhere adds to the committed results; nothing is lost or given to another."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from sweeping import run

from midl.errors import MIDLError
from midl.lab.report import read_results
from midl.lab.report.charts import accuracy_charts
from midl.lab.report.tables import latency_table
from midl.lab.reproduce.export import export
from midl.lab.reproduce.latency import timed_on
from midl.lab.reproduce.plan import Request

HERE, THERE = ({"cpu": name, "instruction_set": "AVX2"} for name in ("here", "there"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep")
    run(out, Request("smoke", ("digits",), ("dense", "converted")))
    return out


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """A sweep of the methods dense and converted, with latencies of both."""
    out = shutil.copytree(trained, tmp_path / "runs")
    names = {method: plain(out, method).name for method in ("dense", "converted")}
    (out / "digits" / "latency.json").write_text(json.dumps(latency(HERE, names, 1.0)))
    return out


def plain(runs: Path, method: str) -> Path:
    """Return the folder of a method's run on the whole, clean data."""
    (folder,) = (f for f in runs.glob(f"digits/{method}-s0-*") if not re.search(r"-[fn]0\.", f.name))
    return folder


def latency(machine: dict[str, str], runs: dict[str, str], seconds: float) -> dict[str, Any]:
    times = {"median": seconds, "low": seconds, "high": seconds, "ratio": 1.0}
    methods = {method: {"run": run, "batch": {"1": times}, "step": times} for method, run in runs.items()}
    return {"machine": machine, "kernels": {}, "threads": 1, "methods": methods}


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "digits-smoke.json").read_text())


def of(content: dict[str, Any], method: str) -> list[dict[str, Any]]:
    """Return a method's runs on the whole, clean data, in their order."""
    specs = ((entry, entry["spec"]) for entry in content["runs"])
    return [e for e, s in specs if s["method"] == method and s["train_fraction"] == 1 and not s["label_noise"]]


@pytest.fixture
def elsewhere(runs: Path, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """An export from another machine: its own dense and converted of seed 0, dense of seed 1, and narrow."""
    export(runs, tmp_path / "results")
    content = written(tmp_path / "results")
    (dense,), (converted,) = of(content, "dense"), of(content, "converted")
    second, narrow = copy.deepcopy(dense), copy.deepcopy(dense)
    second["spec"]["seed"], narrow["spec"]["method"] = 1, "narrow"
    for entry in (dense, converted, second, narrow):
        entry["environment"] = {"machine": THERE}
        entry["accuracy"] = 12.0
    content["runs"] += [second, narrow]
    tuning = copy.deepcopy(next(t for t in content["tunings"] if t["spec"]["method"] == "dense"))
    tuning["spec"]["method"] = "narrow"
    content["tunings"] += [tuning]
    names = {"dense": "dense-s0-0123456789", "narrow": "narrow-s0-0123456789"}
    content["latency"] = latency(THERE, names, 2.0)
    content["failed"] = ["narrow, seed 1: no luck", "dense, seed 0: no luck"]
    (tmp_path / "results" / "digits-smoke.json").write_text(json.dumps(content))
    return tmp_path / "results", content


def test_runs_that_the_folder_lacks_stay_and_those_it_has_are_its_own(
    runs: Path, elsewhere: tuple[Path, dict[str, Any]]
) -> None:
    out, before = elsewhere
    export(runs, out)
    content = written(out)
    assert len(content["runs"]) == len(before["runs"])
    assert [(e["spec"]["seed"], e["environment"].get("machine") == THERE) for e in of(content, "dense")] == [
        (0, False), (1, True),
    ]  # fmt: skip
    assert of(content, "narrow") == of(before, "narrow")
    assert of(content, "dense")[0]["accuracy"] != 12.0
    assert content["failed"] == ["narrow, seed 1: no luck"]
    assert [e["spec"]["method"] for e in content["tunings"]] == ["converted", "dense", "narrow"]
    # A method's maps and histograms once.
    assert ["gate" in e["measures"] for e in of(content, "dense")] == [True, False]
    again = (out / "digits-smoke.json").read_bytes()
    export(runs, out)
    assert (out / "digits-smoke.json").read_bytes() == again


def test_every_latency_keeps_the_machine_that_timed_it(runs: Path, elsewhere: tuple[Path, dict[str, Any]]) -> None:
    out, _ = elsewhere
    export(runs, out)
    merged = written(out)["latency"]
    assert {m: timed_on(merged, m)["machine"]["cpu"] for m in merged["methods"]} == {
        "converted": "here", "dense": "here", "narrow": "there",
    }  # fmt: skip
    results = read_results(out)
    table = latency_table(results, "digits")
    assert table is not None
    assert table.caption.endswith("on here, AVX2, 1 thread")
    assert [row[0].text for row in table.rows] == [
        "dense",
        "dense narrowed (on there, AVX2, 1 thread)",
        "MID-L converted",
    ]
    (against,) = (chart for chart in accuracy_charts(results, "digits") if "batch 1" in chart.title)
    assert [row[0].text for row in against.table.rows] == ["dense", "MID-L converted"]
    # The other machine's times go as soon as it is timed here too, or its network is another one.
    (runs / "digits" / "latency.json").unlink()
    export(runs, out)
    assert written(out)["latency"] == merged
    (out / "digits-smoke.json").write_text(
        json.dumps({**written(out), "latency": latency(THERE, {"dense": "dense-s0-1"}, 2)})
    )
    export(runs, out)
    assert "latency" not in written(out)


def test_the_tunings_points_are_exported(runs: Path, tmp_path: Path) -> None:
    export(runs, tmp_path / "new")
    content = written(tmp_path / "new")
    assert [t["spec"]["method"] for t in content["tunings"]] == ["converted", "dense"]
    for tuning in content["tunings"]:
        grid = tuning["grid"]
        assert len(tuning["points"]) == len(grid["lr_factors"]) * len(grid["weight_decays"])
        best = max(tuning["points"], key=lambda point: point["accuracy"])
        (entry,) = of(content, tuning["spec"]["method"])
        assert entry["spec"]["tuned"] == tuning["tuned"] == {name: best[name] for name in ("lr", "weight_decay")}


def test_files_of_older_versions_are_joined_too(runs: Path, elsewhere: tuple[Path, dict[str, Any]]) -> None:
    out, content = elsewhere
    del content["tunings"], content["failed"], content["latency"]
    for entry in content["runs"]:
        del entry["spec"]["recipe"]["label_smoothing"]
    (out / "digits-smoke.json").write_text(json.dumps(content))
    export(runs, out)
    assert len(of(written(out), "narrow")) == 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("architecture", {"type": "MLP", "hidden": [1]}, "another network or version of the results"),
        ("recipe", {"epochs": 99}, "runs of dense with another recipe"),
    ],
)
def test_runs_of_another_network_or_recipe_are_not_mixed_in(
    field: str, value: object, message: str, runs: Path, elsewhere: tuple[Path, dict[str, Any]]
) -> None:
    out, content = elsewhere
    (second,) = (entry for entry in of(content, "dense") if entry["spec"]["seed"] == 1)
    second["spec"][field] = value
    (out / "digits-smoke.json").write_text(json.dumps(content))
    with pytest.raises(MIDLError, match=rf"digits-smoke\.json holds {message}|{message}"):
        export(runs, out)
    assert json.loads((out / "digits-smoke.json").read_text()) == content


@pytest.mark.parametrize("text", ["{", "[]", '{"latency": {}}', '{"runs": [{}]}'])
def test_a_damaged_file_is_named_and_left_alone(text: str, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "digits-smoke.json").write_text(text)
    with pytest.raises(MIDLError, match=r"digits-smoke\.json is damaged"):
        export(runs, tmp_path)
    assert (tmp_path / "digits-smoke.json").read_text() == text
