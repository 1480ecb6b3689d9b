"""One point measured in this process, on the virtual clock or on the wall's."""

from __future__ import annotations

import gc
import os
import time
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import alone
from benchmarks.alone import Alone
from benchmarks.engine import VIRTUAL_ARGUMENTS, in_process_engine, scheduler_of
from benchmarks.machine import Interference
from benchmarks.meter import StepMeter, StepTime, WallTime, increase
from benchmarks.metrics import Figures, preemption_figures, swap_figures
from benchmarks.plan import Plan
from benchmarks.result import RunResult, result_of
from benchmarks.serving import Clock, Feeder, Served
from benchmarks.step_fit import fit_steps
from benchmarks.timeline import Timeline
from benchmarks.used_pool import shuffle
from benchmarks.virtual_clock import VirtualClock
from benchmarks.virtual_copies import VirtualCopies, block_seconds
from benchmarks.virtual_time import VirtualTime
from benchmarks.wall_clock import WallClock
from benchmarks.warm_up import warm_up_requests
from fastserve_vllm.kv_swap.transfers import Report


def run_point(plan: Plan) -> RunResult:
    """Serve a plan on a fresh engine and condense what happened.

    Call it in a process that has run nothing else: an engine leaves memory and caches behind.
    """
    return _measure(plan).result(plan)


@dataclass(frozen=True)
class _Measured:
    """What a point left behind; `counters` are of the measured part alone."""

    served: Served
    counters: dict[str, Any]
    wall_s: float
    cpu_s: float
    interference: dict[str, float]
    alone: Alone
    timeline: dict[str, list[float]]
    machine: dict[str, Any]

    def result(self, plan: Plan) -> RunResult:
        records = self.served.records
        counters = dict(self.counters)
        scheduler_s = counters.pop("scheduler_wall_s")
        # Prompts share no prefix, so whatever was prefilled beyond them was computed before.
        prompt_tokens = sum(record.prompt_tokens for record in records)
        counters["tokens_recomputed"] = counters["prefill_tokens"] - prompt_tokens
        steps = counters["steps"] - counters["empty_steps"]
        return result_of(
            plan,
            records,
            self.alone,
            figures={
                "step_ms": _steps_ms(self.served.step_s),
                "preemptions": preemption_figures(counters),
                "swaps": swap_figures(counters, sum(self.served.step_s)),
                "tokens_recomputed": counters["tokens_recomputed"],
            },
            counters=counters,
            wall={
                "duration_s": self.wall_s,
                # What other processes on a busy machine take away does not count here.
                "cpu_step_ms": 1000 * self.cpu_s / steps,
                "scheduler_step_ms": 1000 * scheduler_s / steps,
                **self.interference,
                **self.machine,
            },
            timeline=self.timeline,
        )


def _steps_ms(step_s: list[float]) -> Figures:
    """Durations of the engine's steps; the longest ones show stalls."""
    steps_ms = 1000 * np.asarray(step_s)
    p50, p99, p999 = np.percentile(steps_ms, (50, 99, 99.9))
    return {
        "mean": float(steps_ms.mean()),
        "p50": float(p50),
        "p99": float(p99),
        "p99.9": float(p999),
        "max": float(steps_ms.max()),
    }


def _measure(plan: Plan) -> _Measured:
    virtual = plan.clock == "virtual"
    arguments = plan.system.engine_arguments() | (VIRTUAL_ARGUMENTS if virtual else {})
    if virtual and plan.system.fastserve is not None:
        _copy_synchronously()
    with in_process_engine(plan.shape, arguments) as llm:
        scheduler = scheduler_of(llm)
        virtual_clock, step_time = _virtual_time(plan, scheduler) if virtual else (None, WallTime())
        if not virtual:
            shuffle(scheduler.kv_cache_manager.block_pool)
        if plan.system.oracle == "policy":
            from benchmarks import oracle

            oracle.install(scheduler)
        meter = StepMeter(scheduler, step_time)
        feeder = Feeder(llm, plan.system, plan.seed)
        idle = alone.VIRTUAL if virtual else _warm_up(feeder, plan)
        before = meter.counters()
        timeline = Timeline(scheduler)
        clock = virtual_clock or WallClock()
        wall, cpu_s = WallClock(), time.process_time()
        interference = Interference([os.getpid()])
        served = feeder.serve(plan.requests, clock, timeline.sample)
        return _Measured(
            served=served,
            counters=increase(meter.counters(), before),
            wall_s=wall(),
            cpu_s=time.process_time() - cpu_s,
            interference=interference.figures(),
            alone=idle,
            timeline=timeline.columns(),
            machine={} if virtual else _machine(scheduler, meter.shapes, served.step_s),
        )


def _machine(
    scheduler: Any, shapes: list[tuple[int, int, int]], step_s: list[float]
) -> dict[str, Any]:
    """What steps and copies take here, for a simulation of the same engine."""
    exchange = getattr(scheduler, "exchange", None)
    copies = {} if exchange is None else {"block_copy_ms": 1000 * exchange.block_s}
    return {"step_fit": fit_steps(shapes[-len(step_s) :], step_s), **copies}


def _virtual_time(plan: Plan, scheduler: Any) -> tuple[Clock, StepTime]:
    clock = VirtualClock()
    # FastServe's scheduler knows no other time than its clock's; stock vLLM's decides without any.
    if hasattr(scheduler, "clock"):
        scheduler.clock = clock
    copies = VirtualCopies(block_seconds(plan.shape.block_size, plan.copy_ratio))
    return clock, VirtualTime(clock, copies, _carrying)


def _carrying(output: Any, report: Report | None) -> Any:
    """A model runner's output with another report of its worker's copies, or none."""
    from vllm.v1.outputs import KVConnectorOutput

    from fastserve_vllm.kv_swap.metadata import SwapWorkerMetadata

    # Copies, because vLLM shares one output among all steps that compute nothing.
    output = copy(output)
    output.kv_connector_output = copy(output.kv_connector_output or KVConnectorOutput())
    metadata = None if report is None else SwapWorkerMetadata(report)
    output.kv_connector_output.kv_connector_worker_meta = metadata
    return output


def _copy_synchronously() -> None:
    """What a copy takes is the virtual clock's to say, so it may not depend on a thread."""
    from fastserve_vllm.kv_swap.worker import SwapWorker

    SwapWorker.synchronous = True


def _warm_up(feeder: Feeder, plan: Plan) -> Alone:
    """Let the engine meet every kind of step, measure a request alone, and tidy up.

    The first steps of an engine are slow: kernels are chosen and built when they are first needed.
    """
    feeder.serve(warm_up_requests(plan.shape.batch), WallClock())
    records = [
        record
        for request in alone.alone_requests()
        for record in feeder.serve([request], WallClock()).records
    ]
    gc.collect()
    gc.freeze()
    return alone.measured(records)
