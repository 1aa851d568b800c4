"""The report as one HTML page that needs no network, and as tables for a Markdown page."""

from __future__ import annotations

import dataclasses
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from midl.errors import MIDLError
from midl.lab.files import write_text
from midl.lab.report import charts, tables
from midl.lab.report.charts import Chart
from midl.lab.report.claims import Judged, judge_claims
from midl.lab.report.numbers import place_name
from midl.lab.report.records import ROUTES, Results
from midl.lab.report.table import Table, to_markdown
from midl.lab.report.verdicts import RULES, Verdict
from midl.lab.reproduce.latency import timed_on

__all__ = ["BEGIN", "END", "to_html", "to_report_markdown", "update_markdown"]

BEGIN, END = "<!-- midl report: begin -->", "<!-- midl report: end -->"
"""The report's place in a Markdown page."""


@dataclasses.dataclass(frozen=True)
class Panel:
    """All about one data set."""

    dataset: str
    route: str | None
    tables: list[Table]
    accuracy: list[Chart]
    robustness: list[Chart]
    smi: list[Chart]
    activity: list[Chart]
    gates: list[Chart]
    legend: list[tuple[str, str]]


def to_html(results: Results, command: str) -> str:
    """Return the page.

    Args:
        results: what was run.
        command: that made the page, to be shown.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["plain"] = Markup
    folder = files("midl.lab.report")
    judged = judge_claims(results)
    template = environment.from_string((folder / "page.html.jinja").read_text())
    return template.render(
        style=Markup((folder / "page.css").read_text()),
        script=Markup((folder / "page.js").read_text()),
        results=results,
        command=command,
        judged=judged,
        Verdict=Verdict,
        failing=_with_verdict(judged, Verdict.FAILS),
        undecided=_with_verdict(judged, Verdict.UNDECIDED),
        rules=RULES,
        routes=ROUTES,
        overview=tables.overview_table(results),
        coverage=tables.coverage_table(results),
        panels=[_panel(results, dataset) for dataset in results.datasets],
        overfitting=_overfitting(results),
        set_legend=charts.legend(["selected", "unselected", "random"]),
        environments=_environments(results),
        places=_places(results),
        reproduce=_reproduce(results),
    )


def to_report_markdown(results: Results, command: str) -> str:
    """Return verdicts and tables as Markdown."""
    judged = judge_claims(results)
    lines = [
        f"    {_reproduce(results)}", f"    {command}", "",
        f"Profile `{results.profile}`. {RULES} Differences to dense are paired by seed; bold where "
        "Student's 95 % interval excludes zero." + _left_out(results), "",
    ]  # fmt: skip
    lines += ["### At a glance", "", tables.overview_table(results).caption + ":", ""]
    lines += [to_markdown(tables.overview_table(results)), ""]
    for heading, found in (
        ("Does not hold", _with_verdict(judged, Verdict.FAILS)),
        ("Undecided", _with_verdict(judged, Verdict.UNDECIDED)),
    ):
        if found:
            lines += [f"### {heading}", "", *(f"- {text}" for text in found), ""]
    lines += ["### Claims", "", to_markdown(tables.claims_table(results, judged)), ""]
    lines += ["### What was run", "", to_markdown(tables.coverage_table(results)), ""]
    for dataset in results.datasets:
        lines += [f"### {dataset}: methods", ""]
        for table in (*_tables(results, dataset), tables.overfitting_table(results, dataset)):
            if table is not None:
                caption = table.caption.removeprefix(f"{dataset}: ")
                lines += [caption[0].upper() + caption[1:] + ":", "", to_markdown(table), ""]
    for environment in _environments(results):
        lines += [f"Environment: {environment['summary']}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def update_markdown(path: Path, content: str) -> None:
    """Put the report between its marks in a Markdown page; a page that does not exist is made.

    Raises:
        MIDLError: the page has no such marks.
    """
    text = path.read_text() if path.exists() else f"# Results\n\n{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise MIDLError(f"report: {path} has no place for the report, expected the lines {BEGIN} and {END}")
    write_text(path, f"{before}{BEGIN}\n\n{content}\n{END}{after}")


def _with_verdict(judged: list[Judged], verdict: Verdict) -> list[str]:
    """Return one sentence per claim with the data sets that have that verdict."""
    out = []
    for item in judged:
        found = [f"{evidence.dataset}, {evidence.text}" for evidence in item.evidence if evidence.verdict is verdict]
        if found:
            out.append(f"{item.claim.title}: {'; '.join(found)}")
    return out


def _tables(results: Results, dataset: str) -> list[Table]:
    route = results.best_route(dataset)
    found = [
        tables.accuracy_table(results, dataset),
        tables.cost_table(results, dataset),
        tables.latency_table(results, dataset),
        tables.robustness_table(results, dataset),
        tables.smi_table(results, dataset, route) if route else None,
    ]
    return [table for table in found if table is not None]


def _panel(results: Results, dataset: str) -> Panel:
    route = results.best_route(dataset)
    record = next(iter(results.seeds(dataset, route).values())) if route else {}
    return Panel(
        dataset, route, _tables(results, dataset), charts.accuracy_charts(results, dataset),
        charts.robustness_charts(results, dataset), charts.smi_charts(record, dataset),
        charts.activity_charts(record, dataset), charts.gate_charts(record, dataset),
        charts.legend(results.methods(dataset)),
    )  # fmt: skip


def _overfitting(results: Results) -> list[Table]:
    found = (tables.overfitting_table(results, dataset) for dataset in results.datasets)
    return [table for table in found if table is not None]


def _left_out(results: Results) -> str:
    if not results.superseded:
        return ""
    return (
        f" Left out: {results.superseded} runs of another precision, or with a younger one of the same data set, "
        "method, variant and seed."
    )


def _reproduce(results: Results) -> str:
    precision = "" if results.precision is None else f" --precision {results.precision}"
    return f"midl reproduce --profile {results.profile} --data {','.join(results.datasets)}{precision}"


def _places(results: Results) -> list[dict[str, str]]:
    """Return where the latencies of each data set were measured: a summary and everything as JSON."""
    out = []
    for dataset, latency in sorted(results.latency.items()):
        methods: dict[str, list[str]] = {}
        for method in latency["methods"]:
            key = json.dumps(timed_on(latency, method), indent=1, sort_keys=True)
            methods.setdefault(key, []).append(method)
        for place, timed in methods.items():
            which = "" if len(methods) == 1 else f" ({', '.join(timed)})"
            out.append({"summary": f"Latency of {dataset}{which}: {place_name(json.loads(place))}", "json": place})
    return out


def _environments(results: Results) -> list[dict[str, Any]]:
    """Return the different environments of the runs: a summary and everything as JSON."""
    found: dict[str, dict[str, Any]] = {}
    for run in results.runs:
        environment = {k: v for k, v in run.record.get("environment", {}).items() if k != "command"}
        key = json.dumps(environment, sort_keys=True)
        found.setdefault(key, {"environment": environment, "runs": 0})["runs"] += 1
    out = []
    for entry in found.values():
        machine, versions = (entry["environment"].get(name) or {} for name in ("machine", "versions"))
        summary = ", ".join(
            str(text)
            for text in (
                machine.get("cpu"), f"{machine.get('threads')} threads", machine.get("instruction_set"),
                machine.get("system"), f"torch {versions.get('torch')}", f"midl {versions.get('midl')}",
                f"commit {str(entry['environment'].get('commit'))[:20]}", f"{entry['runs']} runs",
            )
        )  # fmt: skip
        out.append({"summary": summary, "json": json.dumps(entry["environment"], indent=1, sort_keys=True)})
    return out
