"""What one measured point is: a system at a load with a seed, and its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.alone import Alone
from benchmarks.metrics import Figures, figures_of
from benchmarks.plan import Plan
from benchmarks.records import RequestRecord, digest_of_run, request_digests


@dataclass(frozen=True)
class RunResult:
    """One system at one load and one seed; a load of None means all present at the start."""

    system: str
    load: float | None
    seed: int
    rate_rps: float | None
    figures: Figures
    # Digest of the whole run's output, and of each request's.
    output_digest: str
    request_digests: Mapping[str, str] = field(repr=False)
    counters: Mapping[str, Any] = field(default_factory=dict)
    # What depends on the machine's speed, kept apart for runs on the virtual clock.
    wall: Mapping[str, Any] = field(default_factory=dict)
    # A request alone on this engine, where that was measured.
    alone: Alone | None = None
    # Columns of samples over the run, where there are any.
    timeline: Mapping[str, Sequence[float]] = field(default_factory=dict, repr=False)


def result_of(
    plan: Plan,
    records: Sequence[RequestRecord],
    idle: Alone,
    *,
    figures: Figures,
    counters: Mapping[str, Any],
    wall: Mapping[str, Any],
    timeline: Mapping[str, Sequence[float]] | None = None,
) -> RunResult:
    """Condense a plan's records; `figures` are those that do not follow from records.

    `idle` is what a request alone takes on this engine; the plan's own, of the baseline, is what
    slowdowns refer to where there is one.
    """
    return RunResult(
        system=plan.system.name,
        load=plan.load,
        seed=plan.seed,
        rate_rps=plan.rate_rps,
        figures={**figures_of(records, plan.alone or idle), **figures},
        output_digest=digest_of_run(records),
        request_digests=request_digests(records),
        counters=counters,
        wall=wall,
        alone=idle,
        timeline=timeline or {},
    )


def value_of(run: RunResult, path: str) -> float | None:
    """Read one number of a point by its dotted path; None where the point has no such thing."""
    return figure_at({**run.figures, "wall": run.wall, "counters": run.counters}, path)


def figure_at(figures: Mapping[str, Any], path: str) -> float | None:
    """Read one number of nested figures likewise."""
    value: Any = figures
    for key in path.split("."):
        value = value.get(key) if value is not None else None
    return None if value is None else float(value)
