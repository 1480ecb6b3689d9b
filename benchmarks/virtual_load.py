"""Latency against load in virtual time, on the real engine.

    python -m benchmarks.virtual_load --trace TRACE.csv --requests 400 --batch 16 \
        --loads 0.3 0.7 1.0 1.2 --systems vllm-fcfs fastserve --seeds 0 1 2 \
        --output benchmarks/results/virtual_sharegpt_b16.json --check-tokens
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from tqdm import tqdm

from benchmarks.cli import (
    arriving_at,
    configuration,
    engine_shape,
    finish,
    headline,
    result_document,
    sampled_workloads,
    with_baseline,
    workload_arguments,
)
from benchmarks.engine import EngineShape
from benchmarks.report import RunResult
from benchmarks.systems import BASELINE, check_runnable
from benchmarks.virtual_clock import StepShape
from benchmarks.virtual_runs import RunPlan, capacity_plan, fresh_processes, run_capacity, run_plan
from benchmarks.workload import Request, all_present

Result = TypeVar("Result")

# Ten decode steps, as the paper's target of 0.3 s per token is on its hardware.
DEFAULT_TARGET_MS = 10 * 1000 * StepShape(prefill_tokens=0, decodes=1).seconds


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Latency against load in virtual time.")
    workload_arguments(parser)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.7, 0.9, 1.0, 1.2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--target-ms", type=float, default=DEFAULT_TARGET_MS)
    parser.add_argument(
        "--check-tokens", action="store_true", help="fail if systems generate different tokens"
    )
    return parser.parse_args(argv)


def measure_capacities(
    shape: EngineShape, workloads: dict[int, list[Request]], jobs: int, progress: tqdm
) -> dict[int, float]:
    """Capacity of the baseline for each seed's sample, requests per second."""
    plans = []
    for seed, requests in workloads.items():
        plans.append(capacity_plan(shape, all_present(requests), seed))
    progress.set_description("capacity")
    return dict(zip(workloads, run_all(run_capacity, plans, jobs, progress), strict=True))


def plans_of(
    system: str,
    shape: EngineShape,
    workloads: dict[int, list[Request]],
    capacities: dict[int, float],
    args: argparse.Namespace,
) -> Iterable[RunPlan]:
    """Every run of a system: each seed at each load."""
    for seed, requests in workloads.items():
        for load in args.loads:
            rate_rps = load * capacities[seed]
            arriving = tuple(arriving_at(requests, rate_rps, seed, args))
            yield RunPlan(system, shape, arriving, seed, load, rate_rps)


def run_all(
    task: Callable[[RunPlan], Result], plans: Iterable[RunPlan], jobs: int, progress: tqdm
) -> list[Result]:
    """Run one system's plans in fresh processes, `jobs` at a time; results in order."""
    results = []
    with fresh_processes(jobs) as processes:
        for result in processes.map(task, plans):
            results.append(result)
            progress.update()
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 1 when tokens are checked and differ."""
    args = parse_arguments(argv)
    systems = with_baseline(args.systems)
    for system in systems:
        check_runnable(system)
    workloads = sampled_workloads(args.trace, args.requests, args.seeds, args.trace_arrivals)
    shape = engine_shape(args, workloads)
    runs: list[RunResult] = []
    total = len(workloads) * (1 + len(systems) * len(args.loads))
    with tqdm(total=total, unit="run") as progress:
        capacities = measure_capacities(shape, workloads, args.jobs, progress)
        for system in systems:
            progress.set_description(system)
            plans = plans_of(system, shape, workloads, capacities, args)
            runs += run_all(run_plan, plans, args.jobs, progress)
    extra = {"capacity_rps": capacities, "sustained": headline(runs, args.target_ms)}
    document = result_document(runs, configuration(args, shape, "virtual"), extra)
    print(f"capacity of {BASELINE}: {', '.join(f'{c:.2f}' for c in capacities.values())} /s\n")
    status = finish(document, runs, args.output)
    return status if args.check_tokens else 0


if __name__ == "__main__":
    sys.exit(main())
