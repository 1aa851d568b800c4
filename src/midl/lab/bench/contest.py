"""A contest: contenders checked against the reference, then timed in interleaved rounds, and the rows of that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

import midl
from midl.errors import KernelError
from midl.lab.bench.ceilings import roofline
from midl.lab.bench.parity import Parity
from midl.lab.bench.registry import Case
from midl.lab.bench.results import Row
from midl.lab.bench.session import Coldness, Session
from midl.lab.bench.timing import Sample, Spread, Timed, interleave, paired_ratio, undisturbed

__all__ = ["Contender", "Contest", "dense_contender", "hold"]

# A case that needs more than this many times its share of time is content with few rounds.
_PATIENCE = 6


@dataclass(frozen=True)
class Contender:
    """Who takes part.

    Args:
        name: unique in its contest.
        role: ``"user"``: the dense layer as a user has it, also a candidate for best dense. ``"dense"``: another
            candidate. ``"midl"``: ours, with a row of its own. ``"read"``: reads as many bytes as ours must, from cold
            memory: the ceiling of the memory while the others ran.
        prepare: gets the round, returns the argument of ``call``; not timed.
        call: what is timed.
        check: compares the contender with the reference.
        flops: operations of one call, for the roofline.
        read_bytes: bytes that one call must move at least.
        implementation: of midl's op, as it was resolved.
        params: what tells this contender from the others.
    """

    name: str
    role: Literal["user", "dense", "midl", "read"]
    prepare: Callable[[int], Any]
    call: Callable[[Any], object]
    check: Callable[[], Parity]
    flops: float = 0.0
    read_bytes: float = 0.0
    implementation: str = ""
    params: dict[str, Any] = field(default_factory=dict)


def dense_contender(
    name: str,
    user: str,
    calls: Sequence[Callable[[Any], object]],
    inputs: Sequence[Tensor],
    check: Callable[[], Parity],
) -> Contender:
    """Return a dense contender that takes ``calls`` and ``inputs`` in turn; ``user`` is the name of a user's own."""
    return Contender(
        name=name,
        role="user" if name == user else "dense",
        prepare=lambda i: (calls[i % len(calls)], inputs[i % len(inputs)].clone()),
        call=lambda argument: argument[0](argument[1]),
        check=check,
    )


@dataclass
class Contest:
    """Contenders and how to time them.

    ``gflops`` is the compute ceiling of the case's dtype, or None where the ceilings do not apply (other threads).
    """

    cold: Coldness
    gflops: float | None
    inner: int = 1
    contenders: list[Contender] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, build: Callable[[], Contender]) -> None:
        """Add the contender that ``build`` returns, or note why this machine cannot run it."""
        try:
            self.contenders.append(build())
        except RuntimeError as error:  # torch's kernels raise it for what the processor lacks, midl's KernelError too
            self.left_out[name] = str(error).strip().splitlines()[0]


def hold(contest: Contest, session: Session, case: Case) -> list[Row]:
    """Check and time the contenders; return a row for each of ours.

    Whoever fails its check is not timed: a dense contender is left out, one of ours gets a row that tells no speed.
    """
    verdicts: dict[str, Parity] = {}
    with midl.kernels("auto"):  # contenders set their own; this restores the caller's choice
        for contender in contest.contenders:
            try:
                verdicts[contender.name] = contender.check()
            except KernelError as error:
                contest.left_out[contender.name] = str(error)
        entered = [c for c in contest.contenders if c.name in verdicts]
        runners = [c for c in entered if verdicts[c.name].ok]
        for contender in entered:
            if contender not in runners and contender.role != "midl":
                contest.left_out[contender.name] = f"parity is red: {verdicts[contender.name]}"
        samples = interleave(
            [Timed(c.prepare, c.call) for c in runners],
            seconds=session.seconds,
            min_rounds=session.min_rounds,
            patience=_PATIENCE * session.seconds,
            warmup=contest.cold.copies,
            inner=contest.inner,
            before_round=contest.cold.sweep,
        )
    times = {c.name: sample for c, sample in zip(runners, samples, strict=True)}
    spreads = {name: Spread.of(undisturbed(sample)) for name, sample in times.items()}
    best = _fastest(spreads, [c.name for c in runners if c.role in ("user", "dense")])
    read = _fastest(spreads, [c.name for c in runners if c.role == "read"])
    user = next(c.name for c in contest.contenders if c.role == "user")
    return [
        _row(contest, session, case, c, verdicts[c.name], times, spreads, user, best, read)
        for c in entered
        if c.role == "midl"
    ]


def _fastest(spreads: dict[str, Spread], names: Sequence[str]) -> str | None:
    return min(names, key=lambda name: spreads[name].median, default=None)


def _row(
    contest: Contest, session: Session, case: Case, contender: Contender, parity: Parity,
    times: dict[str, list[Sample]], spreads: dict[str, Spread], user: str, best: str | None, read: str | None,
) -> Row:  # fmt: skip
    row = Row(
        case=case.name,
        group=case.group,
        contender=contender.name,
        params={**case.params, **contender.params},
        implementation=contender.implementation,
        parity=parity.to_dict(),
        user=user,
        left_out=contest.left_out,
        copies=contest.cold.copies,
    )
    if not parity.ok:
        return row
    ours = times[contender.name]
    row.rounds = len(ours)
    row.preempted = sum(sample.preempted for sample in ours) / len(ours)
    # The other contenders of ours have rows of their own.
    baselines = [c.name for c in contest.contenders if c.role != "midl" and c.name in spreads]
    row.times = {name: spreads[name].to_dict() for name in (*baselines, contender.name)}
    if user in times:
        row.over_user = paired_ratio(times[user], ours).to_dict()
    if best is not None:
        row.best = best
        row.over_best = paired_ratio(times[best], ours).to_dict()
    if read is not None:
        row.of_read = paired_ratio(times[read], ours).to_dict()
    if contest.gflops is not None and contender.read_bytes:
        seconds = spreads[contender.name].median
        row.roofline = roofline(
            contender.flops, contender.read_bytes, seconds, contest.gflops, session.ceilings.read_gbs
        )
    return row
