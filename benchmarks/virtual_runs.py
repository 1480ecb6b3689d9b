"""Single runs in virtual time, each system in a process of its own."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.engine import (
    EngineShape,
    prepare_environment,
    run_virtual,
    scheduler_of,
    virtual_engine,
)
from benchmarks.metrics import figures_of, requests_per_s
from benchmarks.records import RequestRecord, digest_of_run
from benchmarks.report import RunResult
from benchmarks.systems import BASELINE, system_named
from benchmarks.virtual_clock import StepTotals, alone_seconds
from benchmarks.workload import Request


@dataclass(frozen=True)
class RunPlan:
    """One run: which system serves which requests. `load` is 0 for a capacity run."""

    system: str
    shape: EngineShape
    requests: tuple[Request, ...]
    seed: int
    load: float = 0.0
    rate_rps: float = 0.0


def capacity_plan(shape: EngineShape, requests: Sequence[Request], seed: int) -> RunPlan:
    """The run that measures capacity: every request present at the start, on the baseline."""
    return RunPlan(BASELINE, shape, tuple(requests), seed)


def run_capacity(plan: RunPlan) -> float:
    """Requests per second of a capacity plan."""
    return requests_per_s(_serve(plan).records)


def run_plan(plan: RunPlan) -> RunResult:
    """Serve a plan on a fresh engine in this process and condense what happened."""
    served = _serve(plan)
    return RunResult(
        system=plan.system,
        load=plan.load,
        seed=plan.seed,
        rate_rps=plan.rate_rps,
        figures=figures_of(served.records, alone_seconds),
        output_digest=digest_of_run(served.records),
        request_digests={record.id: record.output_digest for record in served.records},
        counters=served.counters(),
        wall=served.wall(),
    )


@contextmanager
def fresh_processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes for one system; systems share no state and no memory that one leaks.

    Virtual time does not care how many runs share the machine; the wall figures do.
    """
    prepare_environment()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=count, mp_context=context) as executor:
        yield executor


@dataclass(frozen=True)
class _Served:
    """What a run left behind."""

    records: list[RequestRecord]
    totals: StepTotals
    own_counters: dict[str, Any]
    wall_s: float

    def counters(self) -> dict[str, Any]:
        # Prompts share no prefix, so whatever was prefilled beyond them was computed before.
        prompt_tokens = sum(record.prompt_tokens for record in self.records)
        return {
            "steps": self.totals.steps,
            "empty_steps": self.totals.empty_steps,
            "vllm_preemptions": self.totals.preemptions,
            "tokens_recomputed": self.totals.prefill_tokens - prompt_tokens,
            **self.own_counters,
        }

    def wall(self) -> dict[str, float]:
        return {
            "duration_s": self.wall_s,
            "step_ms": 1000 * self.wall_s / self.totals.steps,
            "scheduler_step_ms": 1000 * self.totals.scheduler_wall_s / self.totals.steps,
        }


def _serve(plan: RunPlan) -> _Served:
    system = system_named(plan.system)
    with virtual_engine(plan.shape, system) as (llm, clock):
        started = time.perf_counter()
        records = run_virtual(llm, clock, plan.requests, system=system, prompt_seed=plan.seed)
        wall_s = time.perf_counter() - started
        scheduler = scheduler_of(llm)
        own = scheduler.benchmark_counters()
        return _Served(records, scheduler.benchmark_totals, own, wall_s)
