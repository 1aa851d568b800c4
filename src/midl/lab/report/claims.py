"""The paper's claims, put to the numbers of a sweep."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from midl.lab.report.numbers import interval, ratio_to_dense, seconds
from midl.lab.report.records import ROUTES, Results
from midl.lab.report.verdicts import Verdict, combine, judge_better, judge_bound, judge_faster, judge_not_worse
from midl.lab.statistics import Estimate, estimate_mean, paired_difference

__all__ = ["CLAIMS", "Claim", "Evidence", "Judged", "judge_claims", "robustness_areas"]


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What one data set says of a claim: the numbers in words and the verdict."""

    dataset: str
    text: str
    verdict: Verdict


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim and how to test it.

    Args:
        title: in a few words.
        paper: what the paper's abstract says; empty for a test of ours.
        test: from results and data set to the evidence's text and verdict.
        others: the methods that the MID-L routes are compared to.
    """

    title: str
    paper: str
    test: Callable[[Results, str], tuple[str, Verdict]]
    others: tuple[str, ...] = ("dense",)

    def command(self, results: Results) -> str:
        """Return the command that runs what the claim needs, and nothing else."""
        methods = ",".join((*self.others, *ROUTES))
        precision = "" if results.precision is None else f" --precision {results.precision}"
        return f"midl reproduce --profile {results.profile} --methods {methods}{precision}"


@dataclasses.dataclass(frozen=True)
class Judged:
    """A claim with its evidence on every data set and the verdict on all together."""

    claim: Claim
    evidence: tuple[Evidence, ...]

    @property
    def verdict(self) -> Verdict:
        """The verdict on all data sets together."""
        return combine(item.verdict for item in self.evidence)

    @property
    def tally(self) -> str:
        """On how many of the data sets that were run it holds."""
        run = [item for item in self.evidence if item.verdict is not Verdict.MISSING]
        held = sum(item.verdict is Verdict.HOLDS for item in run)
        if not run:
            return ""
        if held < len(run):
            return f"holds on {held} of {len(run)}"
        return f"on all {held} that were run" if held > 1 else "on the one that was run"


def judge_claims(results: Results) -> list[Judged]:
    """Return every claim with its verdict on each data set."""
    return [
        Judged(claim, tuple(Evidence(dataset, *claim.test(results, dataset)) for dataset in results.datasets))
        for claim in CLAIMS
    ]


_NOT_RUN = ("not run", Verdict.MISSING)


def _test_as_good_as(other: str) -> Callable[[Results, str], tuple[str, Verdict]]:
    return lambda results, dataset: _against(results, dataset, results.best_route(dataset), other, judge_not_worse)


def _test_better_than(other: str) -> Callable[[Results, str], tuple[str, Verdict]]:
    return lambda results, dataset: _against(results, dataset, results.best_route(dataset), other, judge_better)


def _against(
    results: Results, dataset: str, route: str | None, other: str, judge: Callable[[Estimate | None], Verdict]
) -> tuple[str, Verdict]:
    if route is None:
        return _NOT_RUN
    difference = paired_difference(
        results.values(dataset, route, "accuracy"), results.values(dataset, other, "accuracy")
    )
    if difference is None:
        return _NOT_RUN
    return f"{route}: {interval(difference)} points", judge(difference)


def _test_active(results: Results, dataset: str) -> tuple[str, Verdict]:
    share = _mean_ratio(results, dataset, "active_neurons", "neurons")
    if share is None:
        return _NOT_RUN
    return f"{100 * share:.1f} % active", judge_bound(100 * share, most=45)


def _test_flops(results: Results, dataset: str) -> tuple[str, Verdict]:
    ratio = _mean_ratio(results, dataset, "dense_flops", "flops")
    if ratio is None:
        return _NOT_RUN
    return f"{ratio:.2f}x fewer", judge_bound(ratio, least=1.7)


def _mean_ratio(results: Results, dataset: str, above: str, below: str) -> float | None:
    route = results.best_route(dataset)
    if route is None:
        return None
    records = results.seeds(dataset, route).values()
    return estimate_mean([record[above] / record[below] for record in records]).mean


def _test_latency(batch: str) -> Callable[[Results, str], tuple[str, Verdict]]:
    def test(results: Results, dataset: str) -> tuple[str, Verdict]:
        times = results.latency.get(dataset, {}).get("methods", {})
        route = results.best_route(dataset, [method for method in ROUTES if method in times])
        if route is None or "dense" not in times:
            return _NOT_RUN
        ours = times[route]["batch"].get(batch)
        if not ours:
            return _NOT_RUN
        dense = times["dense"]["batch"].get(batch, {}).get("form", "eager")
        forms = f"{ours['form']}, dense {dense}" if "form" in ours else "eager alone"
        text = f"{route}: {ratio_to_dense(ours)} dense's time ({seconds(ours['median'])}; {forms})"
        return text, judge_faster(ours)

    return test


def _test_memory(results: Results, dataset: str) -> tuple[str, Verdict]:
    route = results.best_route(dataset)
    if route is None:
        return _NOT_RUN
    ratios = {}
    for field in ("saved_bytes", "weight_bytes"):
        ours, dense = (list(results.values(dataset, method, field).values()) for method in (route, "dense"))
        if not dense:
            return _NOT_RUN
        ratios[field] = estimate_mean(ours).mean / estimate_mean(dense).mean
    text = f"{route}: {ratios['saved_bytes']:.2f}x kept for the backward pass, {ratios['weight_bytes']:.2f}x weights"
    return text, judge_bound(max(ratios.values()), most=1.0)


def _test_smi(view: str) -> Callable[[Results, str], tuple[str, Verdict]]:
    def test(results: Results, dataset: str) -> tuple[str, Verdict]:
        route = results.best_route(dataset)
        if route is None:
            return _NOT_RUN
        overall = [
            record["measures"]["smi"]["overall"].get(view)
            for record in results.seeds(dataset, route).values()
            if "smi" in record.get("measures", {})
        ]
        found = [differences for differences in overall if differences]
        if not found:
            return _NOT_RUN
        unselected, random = (
            estimate_mean([differences[f"selected-{other}"]["mean"] for differences in found])
            for other in ("unselected", "random")
        )
        text = f"{route}: {interval(unselected, 3)} nats to unselected, {interval(random, 3)} to random"
        return text, judge_better(unselected, random)

    return test


def _test_gap(results: Results, dataset: str) -> tuple[str, Verdict]:
    def gap(record: dict[str, float]) -> float:
        return record["train_accuracy"] - record["accuracy"]

    route, difference = _over_variants(results, dataset, gap)
    if route is None or difference is None:
        return _NOT_RUN
    smaller = estimate_mean([-value for value in difference.values])
    return f"{route}: gap {interval(difference)} points", judge_better(smaller)


def _test_little_data(results: Results, dataset: str) -> tuple[str, Verdict]:
    route, difference = _over_variants(results, dataset, lambda record: record["accuracy"])
    if route is None or difference is None:
        return _NOT_RUN
    return f"{route}: {interval(difference)} points of test accuracy", judge_better(difference)


def _over_variants(
    results: Results, dataset: str, measure: Callable[[dict[str, float]], float]
) -> tuple[str | None, Estimate | None]:
    """Return the best route of the study and its paired difference to dense, averaged over the hard conditions."""
    hard = [variant for variant in results.variants(dataset) if variant != (1.0, 0.0)]
    studied = [m for m in ROUTES if hard and all(results.seeds(dataset, m, *variant) for variant in hard)]
    route = results.best_route(dataset, studied)
    if route is None:
        return None, None
    by_seed: dict[int, list[float]] = {}
    for variant in hard:
        ours, dense = results.seeds(dataset, route, *variant), results.seeds(dataset, "dense", *variant)
        for seed in ours.keys() & dense.keys():
            by_seed.setdefault(seed, []).append(measure(ours[seed]) - measure(dense[seed]))
    complete = [values for values in by_seed.values() if len(values) == len(hard)]
    return route, estimate_mean([sum(v) / len(v) for v in complete]) if complete else None


def robustness_areas(results: Results, dataset: str, method: str) -> dict[int, dict[str, float]]:
    """Return, by seed, corruption to area under the accuracy curve, in percent."""
    return {
        seed: {name: curve["area"] for name, curve in record["measures"]["robustness"]["curves"].items()}
        for seed, record in results.seeds(dataset, method).items()
        if "robustness" in record.get("measures", {})
    }


def _test_robustness(results: Results, dataset: str) -> tuple[str, Verdict]:
    route = results.best_route(dataset)
    if route is None:
        return _NOT_RUN
    ours, dense = (
        {seed: sum(areas.values()) / len(areas) for seed, areas in robustness_areas(results, dataset, method).items()}
        for method in (route, "dense")
    )
    difference = paired_difference(ours, dense)
    if difference is None:
        return _NOT_RUN
    return f"{route}: {interval(difference)} points of mean area", judge_better(difference)


CLAIMS = (
    Claim("As accurate as dense", "“maintains or exceeds baseline accuracy”", _test_as_good_as("dense")),
    Claim("At most 45 % of the neurons active", "“up to 55 % reduction in active neurons”", _test_active),
    Claim("1.7x fewer FLOPs, whole network", "“1.7x FLOPs savings”", _test_flops),
    Claim("Faster than dense at batch 1", "“favorable inference latency”", _test_latency("1")),
    Claim("Faster than dense at batch 32", "“favorable inference latency”", _test_latency("32")),
    Claim("No more memory: weights, and kept for the backward pass", "favorable “memory usage”", _test_memory),
    Claim(
        "Each input selects informative neurons (SMI)",
        "“informativeness … of the learned neurons”",
        _test_smi("inputs"),
        (),
    ),
    Claim(
        "Neurons often selected are informative (SMI)",
        "“informativeness … of the learned neurons”",
        _test_smi("neurons"),
        (),
    ),
    Claim("Smaller train/test gap with few or false labels", "“improved robustness under overfitting”", _test_gap),
    Claim("More accurate with few or false labels", "“improved robustness under overfitting”", _test_little_data),
    Claim("More accurate on corrupted inputs", "“improved robustness under … noisy data conditions”", _test_robustness),
    Claim("Better than a narrow dense network of the same FLOPs", "", _test_better_than("narrow"), ("narrow",)),
    Claim(
        "Better than that network with the same teacher and as many epochs",
        "",
        _test_better_than("narrow_distilled"),
        ("narrow_distilled",),
    ),
    Claim(
        "As accurate as dense with the same teacher and as many epochs",
        "",
        _test_as_good_as("distilled_long"),
        ("distilled_long",),
    ),
)
