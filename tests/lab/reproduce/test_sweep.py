"""Sweeps: killed at any moment, shared by workers or hit by errors, the finished results are those of a quiet run."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_rows import Rows, adult_rows
from sweeping import assert_same_models, logs, results, run

from midl.errors import MIDLError
from midl.lab import files
from midl.lab.lock import FolderLock
from midl.lab.methods import METHODS
from midl.lab.reproduce import execute, worker
from midl.lab.reproduce.export import export
from midl.lab.reproduce.listing import list_runs
from midl.lab.reproduce.plan import Request, make_plan, setting_for
from midl.lab.reproduce.profiles import PROFILES
from midl.lab.reproduce.sweep import Options

SMALL = Request("smoke", ("digits",), ("dense",))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    sweep, _ = run(out)
    assert not sweep.outcome.failed
    assert not sweep.outcome.blocked
    return out


def test_results_have_what_the_report_reads(undisturbed: Path) -> None:
    found = [result for result in results(undisturbed).values() if "accuracy" in result]
    assert len(found) == 6
    for result in found:
        assert set(result) == {
            "version", "spec", "accuracy", "train_accuracy", "accuracy_before_distillation", "losses", "flops",
            "dense_flops", "active_neurons", "neurons", "fraction_active", "parameters", "weight_bytes", "saved_bytes",
            "peak_bytes", "measures", "measures_version",
        }  # fmt: skip
        spec = result["spec"]
        assert set(spec) == {
            "dataset", "method", "seed", "profile", "train_fraction", "label_noise", "recipe", "architecture", "tuned",
        }  # fmt: skip
        assert len(result["losses"]) == spec["recipe"]["epochs"]
        assert (result["accuracy_before_distillation"] is None) == (spec["method"] != "converted")
        if spec["method"] != "dense":
            assert result["flops"] * 1.7 <= result["dense_flops"]
            assert result["active_neurons"] <= 0.4532 * result["neurons"]  # 29 of 64 groups


def test_every_epoch_is_in_the_log_once_and_checkpoints_are_gone(undisturbed: Path) -> None:
    for folder, result in results(undisturbed).items():
        if "losses" in result:
            log = [json.loads(line) for line in (undisturbed / folder / "log.jsonl").read_text().splitlines()]
            assert [entry["epoch"] for entry in log] == list(range(1, len(result["losses"]) + 1))
            assert [entry["loss"] for entry in log] == result["losses"]
    assert not list(undisturbed.glob("*/*/*checkpoint*"))


def test_a_second_start_does_nothing(undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    _, lines = run(undisturbed)
    assert lines == []


def test_changed_measures_are_taken_again_without_training(undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = results(undisturbed)
    monkeypatch.setattr(execute, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    for module in (execute, worker):
        monkeypatch.setattr(module, "MEASURES_VERSION", 0)
    run(undisturbed)
    assert {folder: result | {"measures_version": 1} for folder, result in results(undisturbed).items()} == {
        folder: result | {"measures_version": 1} for folder, result in before.items()
    }
    assert {r["measures_version"] for r in results(undisturbed).values() if "accuracy" in r} == {0}
    monkeypatch.undo()
    run(undisturbed)
    assert results(undisturbed) == before


def _start(out: str) -> None:
    run(Path(out))


# The server of the processes imports these once, so that a start takes no seconds.
_PRELOADED = ["midl.lab.reproduce.sweep", "sweeping", "accelerate", "sklearn.datasets", "torch.utils.tensorboard"]


def _kill_and_finish(out: Path, kills: int, longest: float) -> list[Path]:
    """Kill sweeps that often, each time a random while after it got to work, and finish them in peace.

    A sweep that is done before the last kill is followed by another. Returns their folders.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    delays = random.Random(0)
    folders = [out / "0"]
    while kills:
        before = _files(folders[-1])
        process = context.Process(target=_start, args=(str(folders[-1]),))
        process.start()
        while process.is_alive() and _files(folders[-1]) == before:
            time.sleep(0.01)
        process.join(delays.uniform(0, longest))
        if process.is_alive():
            process.kill()
            kills -= 1
        else:
            assert process.exitcode == 0
            folders.append(out / str(len(folders)))
        process.join()
    for folder in folders:
        sweep, _ = run(folder)
        assert not sweep.outcome.failed
    return folders


def _files(out: Path) -> set[tuple[Path, int]]:
    """Return the files that tasks at work wrote, and when."""
    found = set()
    for file in out.glob("*/*/*"):
        with suppress(FileNotFoundError):  # temporary ones
            found.add((file, file.stat().st_mtime_ns))
    return {(file, written) for file, written in found if "run.json" not in file.name}


def _assert_same_sweeps(one: Path, other: Path) -> None:
    assert results(one) == results(other)
    assert logs(one) == logs(other)
    assert_same_models(one, other)
    files = ({file.relative_to(out) for file in out.glob("*/*/*") if not file.is_dir()} for out in (one, other))
    assert next(files) == next(files)  # no checkpoints, and nothing half written


def test_a_sweep_that_is_killed_three_times_ends_as_the_undisturbed_one(undisturbed: Path, tmp_path: Path) -> None:
    for out in _kill_and_finish(tmp_path, kills=3, longest=1.5):
        _assert_same_sweeps(out, undisturbed)


@pytest.mark.slow
def test_a_sweep_that_is_killed_twenty_times_ends_as_the_undisturbed_one(undisturbed: Path, tmp_path: Path) -> None:
    for out in _kill_and_finish(tmp_path, kills=20, longest=0.6):
        _assert_same_sweeps(out, undisturbed)


def test_what_a_kill_left_in_a_finished_folder_goes_with_the_next_start(undisturbed: Path, tmp_path: Path) -> None:
    out = shutil.copytree(undisturbed, tmp_path / "runs")
    checkpoint = _folder(out, "dense-s0-n0.4") / "checkpoint.safetensors"
    checkpoint.write_bytes(b"of a process that was killed right after it had finished")
    run(out)
    assert not checkpoint.exists()
    assert results(out) == results(undisturbed)


def test_latency_is_measured_once_for_all_methods(undisturbed: Path) -> None:
    sweep, _ = run(undisturbed, options=Options(threads=1))
    (file,) = sweep.latencies
    latency = json.loads(file.read_text())
    assert list(latency["methods"]) == ["dense", "converted"]
    for method, entry in latency["methods"].items():
        assert set(entry["batch"]) == {"1", "16"}
        for times in (*entry["batch"].values(), entry["step"]):
            assert 0 < times["low"] <= times["median"] <= times["high"]
            assert times["ratio"] == 1 or method != "dense"
    before = file.read_bytes()
    run(undisturbed, options=Options(threads=1))
    assert file.read_bytes() == before
    del latency["methods"]["converted"]["step"]["ratio"]  # as older versions wrote it
    file.write_text(json.dumps(latency))
    run(undisturbed, options=Options(threads=1))
    assert "ratio" in json.loads(file.read_text())["methods"]["converted"]["step"]
    before = file.read_bytes()
    run(undisturbed, Request("smoke", ("digits",), ("dense",)), options=Options(threads=1))  # a part of it
    assert file.read_bytes() == before


def test_latency_is_measured_with_the_threads_asked_for(undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(
        "midl.lab.reproduce.sweep.measure_latencies", lambda plan, out, dataset: seen.append(torch.get_num_threads())
    )
    before = torch.get_num_threads()
    for threads in (1, 2):
        run(undisturbed, options=Options(threads=threads))
    assert seen == [1, 2]
    assert torch.get_num_threads() == before


@pytest.fixture
def _no_settings_kept() -> Iterator[None]:
    setting_for.cache_clear()
    yield
    setting_for.cache_clear()


@pytest.mark.usefixtures("_no_settings_kept")
@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_rows_that_are_scored_or_fitted_are_of_all_classes(
    order: str, make_mirror: Callable[[str, Rows], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = adult_rows()["train"]
    rows = {name: [values[0]] * 200 + [values[1]] * 200 for name, values in few.items()}  # not more than 50K, more
    if order == "shuffled":
        places = random.Random(0).sample(range(400), 400)
        rows = {name: [values[place] for place in places] for name, values in rows.items()}
    make_mirror("adult", {"train": rows, "test": rows})
    fitted: list[float] = []
    scored: list[float] = []
    adapted, measure = METHODS["adapted"], execute.measure_accuracy

    def fit(model: Any, architecture: Any, budget: Any, batches: Sequence[torch.Tensor]) -> None:
        ages = torch.cat(list(batches))[:, 0]  # standardised; tells the two persons apart
        fitted.append(float((ages > 0).double().mean()))
        assert adapted.fit is not None
        adapted.fit(model, architecture, budget, batches)

    def measure_accuracy(model: Any, dataset: Any, split: Any = None) -> Any:
        scored.append(float((dataset.test if split is None else split).y.double().mean()))
        return measure(model, dataset, split)

    monkeypatch.setitem(METHODS, "adapted", dataclasses.replace(adapted, fit=fit))
    monkeypatch.setattr(execute, "measure_accuracy", measure_accuracy)
    monkeypatch.setattr(execute, "_TRAIN_ROWS", 64)
    monkeypatch.setitem(PROFILES, "smoke", dataclasses.replace(PROFILES["smoke"], fit_rows=64))
    sweep, _ = run(tmp_path / "runs", Request("smoke", ("adult",), ("dense", "adapted")))
    assert not sweep.outcome.failed
    assert fitted
    assert all(0.25 < share < 0.75 for share in [*fitted, *scored])
    assert {task.settings.get("rows") for task in sweep.plan.tasks} == {"random" if order == "sorted" else None}
    assert ("-random-" in sweep.plan.tasks[0].settings["data"]) == (order == "sorted")


def _folder(out: Path, start: str) -> Path:
    (folder,) = out.glob(f"digits/{start}-*")
    return folder


def test_a_damaged_checkpoint_fails_one_run_with_the_reason_and_loses_no_other(tmp_path: Path) -> None:
    (task,) = [t for t in make_plan(SMALL).tasks if t.folder.name.startswith("dense-s0-n0.4")]
    (tmp_path / task.folder).mkdir(parents=True)
    checkpoint = tmp_path / task.folder / "checkpoint.safetensors"
    checkpoint.write_bytes(b"half a file")
    sweep, lines = run(tmp_path, SMALL)
    assert sweep.outcome.failed == (task.folder,)
    finished = results(tmp_path)
    assert len(finished) == 3
    assert any("FAILED" in line and "delete it to train this run from the start" in line for line in lines)
    (state,) = [state for state in list_runs(tmp_path) if state.folder == tmp_path / task.folder]
    assert state.state == "failed"
    assert "checkpoint.safetensors is no checkpoint of this run" in state.reason
    checkpoint.unlink()
    sweep, _ = run(tmp_path, SMALL)
    assert not sweep.outcome.failed
    assert finished.items() < results(tmp_path).items()


def test_what_needs_a_failed_run_is_blocked_and_the_rest_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = execute.train

    def fail_on_noise(model: Any, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if "random-labels" in dataset.fingerprint:
            raise MIDLError("train: the loss of epoch 1 is nan, expected a finite one")
        return train(model, dataset, *args, **kwargs)

    monkeypatch.setattr(execute, "train", fail_on_noise)
    sweep, _ = run(tmp_path, Request("smoke", ("digits",), ("dense", "converted")))
    assert [path.name.rpartition("-")[0] for path in sweep.outcome.failed] == ["dense-s0-n0.4"]
    assert [path.name.rpartition("-")[0] for path in sweep.outcome.blocked] == ["converted-s0-n0.4"]
    assert len(results(tmp_path)) == 6


def test_a_full_disk_stops_the_sweep_with_the_reason_and_loses_no_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = files.os.replace
    room = 40

    def replace(source: Any, target: Any) -> None:
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", replace)
        with pytest.raises(MIDLError, match=r"cannot be written .*No space left.*finished runs are kept: make room"):
            run(tmp_path)
    finished = results(tmp_path)
    assert finished
    run(tmp_path)
    assert finished.items() <= results(tmp_path).items()
    assert len(results(tmp_path)) == 8


def test_states_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("midl.lab.reproduce.sweep.LAUNCHERS", {"local": lambda *args: None})
    run(tmp_path, SMALL)
    assert {state.state for state in list_runs(tmp_path)} == {"waiting"}
    with FolderLock(_folder(tmp_path, "dense-s0-n0.4")):
        assert [s.state for s in list_runs(tmp_path)].count("running") == 1
    (_folder(tmp_path, "dense-s0-n0.4") / "log.jsonl").write_text('{"epoch": 1}\n')
    assert [(s.state, s.epochs) for s in list_runs(tmp_path)].count(("stopped", 1)) == 1


def test_the_export_is_compact_and_does_not_depend_on_the_order_of_the_runs(undisturbed: Path, tmp_path: Path) -> None:
    (file,) = export(undisturbed, tmp_path)
    assert file.name == "digits-smoke.json"
    content = json.loads(file.read_text())
    methods = [(run["spec"]["method"], run["spec"]["train_fraction"]) for run in content["runs"]]
    assert methods == [(m, f) for m in ("converted", "dense") for f in (1.0, 1.0, 0.1)]
    assert all("losses" not in run for run in content["runs"])
    assert [sorted(run["measures"]) for run in content["runs"][:3]] == [
        ["activity", "gate", "robustness", "smi"], [], [],
    ]  # fmt: skip
    before = file.read_bytes()
    export(undisturbed, tmp_path)
    assert file.read_bytes() == before


def test_a_folder_without_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MIDLError, match=r"holds no runs, expected the folder that midl reproduce wrote to"):
        list_runs(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("launcher", "slurm", r"launcher='slurm', expected one of \['local'"),
        ("workers", 0, "workers=0, expected a positive int"),
        ("threads", 0, "threads=0, expected a positive int"),
    ],
)
def test_options_refuse_wrong_values(field: str, value: object, message: str) -> None:
    with pytest.raises(MIDLError, match=message):
        Options(**{field: value})  # type: ignore[arg-type]
