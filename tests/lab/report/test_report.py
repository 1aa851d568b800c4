"""The report of made-up results: reading, claims, tables, the page and the Markdown."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic import METHODS, make_record, write_sweep
from typer.testing import CliRunner

from midl.errors import MIDLError
from midl.lab import methods as lab_methods
from midl.lab.commands import app
from midl.lab.report import Results, read_results, svg, to_html, to_report_markdown, update_markdown
from midl.lab.report.charts import _shape
from midl.lab.report.claims import judge_claims
from midl.lab.report.page import BEGIN, END
from midl.lab.report.records import ROUTES
from midl.lab.report.table import to_markdown
from midl.lab.report.tables import accuracy_table, coverage_table, overfitting_table, overview_table, robustness_table
from midl.lab.report.verdicts import Verdict


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def results(sweep: Path) -> Results:
    return read_results(sweep)


@pytest.fixture(scope="module")
def page(results: Results) -> str:
    return to_html(results, "midl report runs")


def test_reading_a_sweep(results: Results) -> None:
    assert results.datasets == ["mnist", "adult"]
    assert results.methods("adult") == list(METHODS)
    assert results.profile == "paper"
    assert sorted(results.values("mnist", "dense", "accuracy")) == [0, 1, 2]
    assert results.variants("mnist") == [(1.0, 0.0), (0.1, 0.0), (0.01, 0.0), (1.0, 0.4)]
    assert results.best_route("mnist") == "converted"


@pytest.mark.parametrize(
    ("fraction_active", "active_neurons", "route"),
    [
        ({"hidden1": 0.0, "hidden2": 0.0}, 0.0, "scratch"),  # light paths alone
        ({"hidden2": 0.0}, 1024.0, "scratch"),  # and hidden1 left dense: its neurons are active, none was selected
        ({"hidden1": 0.0, "hidden2": 1.0}, 1024.0, "scratch"),  # all neurons of a layer are no choice either
        ({}, 2048.0, "scratch"),
        ({"hidden1": 0.0, "hidden2": 0.25}, 256.0, "elastic"),
    ],
)
def test_networks_that_select_nothing_are_no_route(
    fraction_active: dict[str, float], active_neurons: float, route: str, tmp_path: Path
) -> None:
    records = [make_record("mnist", method, seed) for method in ("dense", "scratch", "elastic") for seed in range(3)]
    for record in records:
        if record["spec"]["method"] == "elastic":
            record.update(accuracy=99.9, active_neurons=active_neurons, fraction_active=fraction_active)
    (tmp_path / "mnist.json").write_text(json.dumps({"runs": records}))
    assert read_results(tmp_path).best_route("mnist") == route


def test_a_route_selects_with_every_seed(tmp_path: Path) -> None:
    records = [make_record("mnist", method, seed) for method in ("dense", "scratch", "converted") for seed in range(3)]
    assert records[-1]["spec"]["method"] == "converted"
    records[-1]["fraction_active"] = {"hidden1": 0.0}
    (tmp_path / "mnist.json").write_text(json.dumps({"runs": records}))
    assert read_results(tmp_path).best_route("mnist") == "scratch"


def test_compact_results_give_the_same_tables(sweep: Path, results: Results, tmp_path: Path) -> None:
    for dataset in results.datasets:
        runs = [run.record for run in results.runs if run.dataset == dataset]
        latency = json.loads((sweep / dataset / "latency.json").read_text())
        (tmp_path / f"{dataset}.json").write_text(json.dumps({"runs": runs, "latency": latency}))
    assert to_report_markdown(read_results(tmp_path), "x") == to_report_markdown(results, "x")


def test_another_profile_is_left_out_and_the_youngest_of_equal_runs_counts(sweep: Path, tmp_path: Path) -> None:
    records = [make_record("mnist", "dense", 0), make_record("mnist", "dense", 0)]
    records[1]["accuracy"] = 12.0
    records += [make_record("mnist", "dense", seed, profile="smoke") for seed in range(5)]
    (tmp_path / "mnist.json").write_text(json.dumps({"runs": records}))
    results = read_results(tmp_path)
    assert (len(results.runs), results.superseded) == (1, 1)
    assert results.values("mnist", "dense", "accuracy") == {0: 12.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "holds no results"), ("{", "mnist.json is damaged"), ('{"runs": [{"spec": {}}]}', "a record without")],
)
def test_unreadable_results_are_errors(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "mnist.json").write_text(content)
    with pytest.raises(MIDLError, match=message):
        read_results(tmp_path)


def test_the_claims_on_known_differences(results: Results) -> None:
    verdicts = {judged.claim.title: judged for judged in judge_claims(results)}
    assert verdicts["As accurate as dense"].verdict is Verdict.HOLDS
    assert verdicts["As accurate as dense"].evidence[0].text.startswith("converted: +0.3")
    assert verdicts["At most 45 % of the neurons active"].verdict is Verdict.HOLDS
    assert verdicts["1.7x fewer FLOPs, whole network"].verdict is Verdict.HOLDS
    assert verdicts["Faster than dense at batch 32"].verdict is Verdict.HOLDS
    assert "s time (1.20 ms; compiled, dense compiled)" in verdicts["Faster than dense at batch 32"].evidence[0].text
    assert verdicts["Each input selects informative neurons (SMI)"].verdict is Verdict.HOLDS
    assert verdicts["Neurons often selected are informative (SMI)"].verdict is Verdict.FAILS
    assert verdicts["Better than a narrow dense network of the same FLOPs"].verdict is Verdict.HOLDS
    overfitting = verdicts["Smaller train/test gap with few or false labels"]
    assert [evidence.verdict for evidence in overfitting.evidence] == [Verdict.HOLDS, Verdict.MISSING]
    assert overfitting.tally == "on the one that was run"


def test_what_was_published_is_what_the_pages_say() -> None:
    root = Path(__file__).parents[3]
    overview = to_markdown(overview_table(read_results(root / "results")))
    assert overview.count("\n") == 1 + 5
    for page in ("README.md", "docs/results.md"):
        assert overview in (root / page).read_text(), f"{page}: midl report results --markdown docs/results.md"


def test_timings_of_eager_networks_alone_say_so(results: Results) -> None:
    older = copy.deepcopy(results.latency)
    for entry in older["mnist"]["methods"].values():
        del entry["batch"]["32"]["form"]
    verdicts = {j.claim.title: j for j in judge_claims(dataclasses.replace(results, latency=older))}
    assert "(1.20 ms; eager alone)" in verdicts["Faster than dense at batch 32"].evidence[0].text
    assert "(360 µs; eager, dense eager)" in verdicts["Faster than dense at batch 1"].evidence[0].text


def test_results_without_measures_or_latency_still_make_a_report(tmp_path: Path) -> None:
    records = [make_record("mnist", method, 0) for method in ("dense", "scratch")]
    for record in records:
        record["measures"] = {}
    (tmp_path / "mnist.json").write_text(json.dumps({"runs": records}))
    results = read_results(tmp_path)
    verdicts = {judged.claim.title: judged.verdict for judged in judge_claims(results)}
    assert verdicts["As accurate as dense"] is Verdict.UNDECIDED  # one seed
    assert verdicts["Faster than dense at batch 1"] is Verdict.MISSING
    assert verdicts["More accurate on corrupted inputs"] is Verdict.MISSING
    assert "not run" in to_html(results, "x")
    assert to_report_markdown(results, "x")


def test_a_sweep_without_dense_or_without_mid_layers_still_makes_a_report(tmp_path: Path) -> None:
    for method in ("dense", "scratch"):
        (tmp_path / "mnist.json").write_text(json.dumps({"runs": [make_record("mnist", method, 0)]}))
        assert to_html(read_results(tmp_path), "x")


def test_bold_is_only_what_excludes_zero(results: Results) -> None:
    for row in accuracy_table(results, "mnist").rows:
        difference = row[2]
        if not difference.text:
            continue
        low, high = (float(v.replace("−", "-")) for v in re.findall(r"[+−]?\d+\.\d+", difference.text)[1:])
        assert difference.strong == (low > 0 or high < 0)


def test_tables_have_as_many_cells_as_columns(results: Results) -> None:
    tables = [
        accuracy_table(results, "mnist"), overfitting_table(results, "mnist"), robustness_table(results, "mnist"),
        coverage_table(results),
    ]  # fmt: skip
    for table in tables:
        assert table is not None
        assert table.rows
        assert all(len(row) == len(table.columns) for row in table.rows)
    assert overfitting_table(results, "adult") is None


def test_svhn_and_what_has_not_run_are_listed(results: Results) -> None:
    rows = {row[0].text: row[1].text for row in coverage_table(results).rows}
    assert rows["imdb"] == "not run"
    assert rows["svhn"].startswith("not run: its data could not be had offline")
    assert rows["mnist"].startswith("dense 3, ")


def test_half_a_record_is_an_error(tmp_path: Path) -> None:
    record = make_record("mnist", "dense", 0)
    del record["train_accuracy"]
    (tmp_path / "mnist.json").write_text(json.dumps({"runs": [record]}))
    with pytest.raises(MIDLError, match="a record without 'train_accuracy'"):
        read_results(tmp_path)


def test_latencies_are_those_of_networks_in_the_report(tmp_path: Path) -> None:
    write_sweep(tmp_path, ("mnist",), seeds=1)
    shutil.rmtree(tmp_path / "mnist" / "low_rank-s0-1.0-0.0")
    timed = read_results(tmp_path).latency["mnist"]["methods"]
    assert "low_rank" not in timed
    assert "dense" in timed
    (tmp_path / "mnist" / "latency.json").write_text("{}")
    with pytest.raises(MIDLError, match=r"latency\.json is damaged"):
        read_results(tmp_path)


def test_one_precision_at_a_time(tmp_path: Path) -> None:
    records = [make_record("mnist", method, seed) for method in ("dense", "scratch") for seed in range(2)]
    other = make_record("mnist", "scratch", 0)
    other["accuracy"], other["spec"]["recipe"] = 1.0, {"epochs": 8, "precision": "bf16"}
    (tmp_path / "mnist.json").write_text(json.dumps({"runs": [*records, other]}))
    results = read_results(tmp_path)
    assert (results.precision, results.superseded, len(results.runs)) == (None, 1, 4)
    assert min(results.values("mnist", "scratch", "accuracy").values()) > 90
    (tmp_path / "mnist.json").write_text(json.dumps({"runs": [other]}))
    markdown = to_report_markdown(read_results(tmp_path), "midl report")
    assert "--precision bf16" in markdown


def test_failed_runs_are_listed_with_the_reason(tmp_path: Path) -> None:
    write_sweep(tmp_path, ("mnist",), seeds=1)
    spec = {"dataset": "mnist", "method": "scratch", "seed": 1, "profile": "paper"}
    folder = tmp_path / "mnist" / "scratch-s1-0123456789"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"kind": "run", "settings": {"spec": spec}}))
    (folder / "failure.json").write_text(json.dumps({"reason": "no space left", "time": 0, "trace": ""}))
    rows = {row[0].text: row[1].text for row in coverage_table(read_results(tmp_path)).rows}
    assert rows["mnist"].endswith("; failed: scratch, seed 1: no space left")


class _Tags(HTMLParser):
    """Checks that tags are closed in order, and collects attributes."""

    VOID = frozenset({"meta", "link", "br", "wbr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_needs_nothing_from_outside(page: str) -> None:
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    for tag, attributes in tags.seen:
        for name in ("src", "href"):
            address = attributes.get(name) or "#"
            assert tag == "a" or address.startswith(("#", "data:")), (tag, address)
    assert "url(" not in page
    assert "@import" not in page
    assert "A &lt;processor&gt; &amp; more" in page  # escaped


def test_every_chart_has_words_and_a_table(page: str) -> None:
    charts = page.count('role="img"')
    assert charts == page.count("<figure>") == page.count("<details><summary>Table</summary>") > 20
    assert all(len(words) > 30 for words in re.findall(r'role="img" aria-label="([^"]*)"', page))
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert not re.search(r"[\s,\"MLHV](nan|inf)\b", re.sub(r"base64,[^\"]*", "", drawn))


def test_every_method_has_a_mark_and_a_colour_of_its_own() -> None:
    marks = {svg.mark(_shape(method), 0, 0, "any") for method in lab_methods.METHODS}
    assert len(marks) == len(lab_methods.METHODS)
    style = (Path(svg.__file__).parent / "page.css").read_text()
    for method in lab_methods.METHODS:
        assert f".c-{method} {{ color: var(--{method}); }}" in style
        assert len(re.findall(rf"--{method}: #", style)) == 2  # light and dark


def test_the_page_names_every_route(page: str) -> None:
    assert f"among {', '.join(ROUTES)}, which favours it a little" in page


def test_what_fails_comes_first(page: str) -> None:
    against = page.index("What does not hold")
    assert (
        against
        < page.index("Neurons often selected are informative (SMI): mnist")
        < page.index('<section id="claims">')
    )


def test_the_page_is_the_same_each_time(results: Results, page: str) -> None:
    assert to_html(results, "midl report runs") == page


def test_markdown_goes_between_its_marks(tmp_path: Path, results: Results) -> None:
    file = tmp_path / "results.md"
    file.write_text(f"# Mine\n\nbefore\n\n{BEGIN}\nfrom yesterday\n{END}\n\nafter\n")
    content = to_report_markdown(results, "midl report runs")
    for _ in range(2):
        update_markdown(file, content)
        text = file.read_text()
        assert text.startswith("# Mine\n\nbefore\n")
        assert text.endswith("\n\nafter\n")
        assert "from yesterday" not in text
    lines = [line for line in content.splitlines() if line.startswith("|")]
    assert len(lines) > 60
    other = tmp_path / "other.md"
    other.write_text("# No marks\n")
    with pytest.raises(MIDLError, match="has no place for the report"):
        update_markdown(other, content)


def test_the_command(sweep: Path, tmp_path: Path) -> None:
    out, markdown = tmp_path / "a" / "report.html", tmp_path / "results.md"
    run = CliRunner().invoke(app, ["report", str(sweep), "--out", str(out), "--markdown", str(markdown)])
    assert run.exit_code == 0, run.output
    assert out.read_text().startswith("<!doctype html>")
    assert "### Claims" in markdown.read_text()
    nothing = CliRunner().invoke(app, ["report", str(tmp_path / "nothing")])
    assert nothing.exit_code == 1
    assert "holds no results" in nothing.output
