"""The plan: folders are named by what their results depend on, and by nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from lab_rows import Rows, adult_rows

from midl.errors import DataError, MIDLError
from midl.lab import methods
from midl.lab.recipes import recipes_for
from midl.lab.reproduce import plan as planning
from midl.lab.reproduce.plan import Plan, Request, make_plan
from midl.lab.reproduce.profiles import profile_named
from midl.lab.training import Precision

DIGITS = Request("smoke", ("digits",), ("dense", "converted"), (0,))


@pytest.fixture(autouse=True)
def _fresh() -> None:
    planning.setting_for.cache_clear()


def folders(plan: Plan) -> list[str]:
    return [str(task.folder) for task in plan.tasks]


def test_the_same_request_gives_the_same_folders_each_after_what_it_needs() -> None:
    plan = make_plan(DIGITS)
    assert folders(plan) == folders(make_plan(DIGITS))
    names = [folder.rpartition("-")[0] for folder in folders(plan)]
    assert names == [
        "digits/dense-tuning", "digits/converted-tuning", "digits/dense-s0", "digits/converted-s0",
        "digits/dense-s0-f0.1", "digits/converted-s0-f0.1", "digits/dense-s0-n0.4", "digits/converted-s0-n0.4",
    ]  # fmt: skip
    seen: set[Path] = set()
    for task in plan.tasks:
        assert seen.issuperset(task.needs)
        seen.add(task.folder)


def test_a_method_brings_what_it_needs() -> None:
    plan = make_plan(Request("smoke", ("digits",), ("converted",)))
    assert {task.spec["method"] for task in plan.tasks} == {"converted", "dense"}
    variants = {(t.spec["train_fraction"], t.spec["label_noise"]) for t in plan.tasks if t.kind == "run"}
    assert variants == {(1.0, 0.0), (0.1, 0.0), (1.0, 0.4)}


def test_long_methods_with_a_teacher_train_for_as_long_as_both_phases() -> None:
    wanted = ("dense", "distilled", "distilled_long", "narrow_distilled", "gated_long")
    plan = make_plan(Request("smoke", ("digits",), wanted))
    runs = {t.spec["method"]: t for t in plan.tasks if t.kind == "run" and t.spec["train_fraction"] == 1}
    assert [runs[method].recipe.epochs for method in wanted] == [2, 1, 3, 3, 3]
    assert [runs[method].teacher is not None for method in wanted] == [False, True, True, True, True]
    assert runs["narrow_distilled"].recipe == runs["distilled_long"].recipe == runs["gated_long"].recipe
    assert runs["gated_long"].recipe.lr == runs["dense"].recipe.lr


def test_photographs_distil_for_longer_than_their_recipe() -> None:
    paper = profile_named("paper")
    assert paper.epochs_for("cifar100", recipes_for("cifar100")) == (12, 6)
    assert paper.epochs_for("mnist", recipes_for("mnist")) == (8, 2)
    assert profile_named("smoke").epochs_for("cifar100", recipes_for("cifar100")) == (2, 1)


def test_a_teacher_in_another_precision_moves_its_pupils() -> None:
    def where(precision: Precision | None) -> list[dict[str, object]]:
        request = Request("smoke", ("digits",), ("converted",), precision=precision)
        return [task.settings for task in make_plan(request).tasks if task.spec["method"] == "converted"]

    assert all("teacher" not in settings for settings in where(None))
    assert all(settings["teacher"] == "bf16" for settings in where("bf16"))


def test_a_changed_method_moves_its_own_folders_and_those_that_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {t.folder.name.rpartition("-")[0]: t.folder for t in make_plan(DIGITS).tasks}

    def changed(name: str) -> set[str]:
        method = dataclasses.replace(methods.METHODS[name], settings={"other": 1})
        with monkeypatch.context() as patch:
            patch.setitem(methods.METHODS, name, method)
            after = {t.folder.name.rpartition("-")[0]: t.folder for t in make_plan(DIGITS).tasks}
        return {name for name, folder in before.items() if after[name] != folder}

    assert changed("converted") == {name for name in before if name.startswith("converted")}
    assert changed("dense") == set(before)
    assert changed("elastic") == set()


def test_a_new_version_of_the_results_moves_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    before = folders(make_plan(DIGITS))
    monkeypatch.setattr(planning, "RESULTS_VERSION", 99)
    assert not set(before) & set(folders(make_plan(DIGITS)))


def test_a_data_set_that_the_mirror_lacks_is_left_out(make_mirror: Callable[[str, Rows], Path]) -> None:
    mirror = make_mirror("adult", adult_rows())
    plan = make_plan(Request("smoke", ("digits", "svhn"), ("dense",)))
    assert {task.spec["dataset"] for task in plan.tasks} == {"digits"}
    assert plan.left_out == {"svhn": f"dataset='svhn': the mirror {mirror} has no svhn/train.parquet"}


def test_an_unreadable_data_set_is_left_out(make_mirror: Callable[[str, Rows], Path]) -> None:
    mirror = make_mirror("adult", adult_rows())
    (mirror / "adult" / "test.parquet").write_bytes(b"no parquet")
    plan = make_plan(Request("smoke", ("adult", "digits"), ("dense",)))
    assert {task.spec["dataset"] for task in plan.tasks} == {"digits"}
    assert "adult/test.parquet is corrupted" in plan.left_out["adult"]


def test_a_cache_that_cannot_be_used_leaves_out_what_needs_it(
    make_mirror: Callable[[str, Rows], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_mirror("adult", adult_rows())
    (tmp_path / "file").touch()
    monkeypatch.setenv("MIDL_CACHE", str(tmp_path / "file"))
    plan = make_plan(Request("smoke", ("adult", "digits"), ("dense",)))
    assert {task.spec["dataset"] for task in plan.tasks} == {"digits"}
    assert plan.left_out["adult"].endswith("file' is no folder, expected a folder that can be read and written")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"profile": "large"}, MIDLError, r"profile='large' is unknown, expected one of \['smoke', 'paper'\]"),
        ({"datasets": ("mnist2",)}, DataError, "dataset='mnist2' is unknown"),
        ({"methods": ("magic",)}, MIDLError, "method='magic' is unknown, expected one of"),
        ({"seeds": ()}, MIDLError, r"seeds=\(\), expected different values, at least one"),
        ({"seeds": (1, 1)}, MIDLError, r"seeds=\(1, 1\), expected different values"),
        ({"seeds": (-1,)}, MIDLError, r"seeds=\(-1,\), expected integers from 0 to"),
    ],
)
def test_requests_refuse_wrong_values(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Request(**{"profile": "smoke", **arguments})  # type: ignore[arg-type]
