"""Measures a figure's settings: capacity first, then each system's search for its rate."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.cli import experiment_of, parse_arguments
from benchmarks.figures.catalogue import Goal, PaperFigure, Setting
from benchmarks.figures.search import search
from benchmarks.result import RunResult, value_of
from benchmarks.run import Points, plan_of
from benchmarks.store import Store
from benchmarks.systems import BASELINE, System, system_named

# Requests that may miss their targets.
ALLOWED_MISSES = 0.05


@dataclass(frozen=True)
class Measured:
    """A setting's points, and by system and seed the rate that it sustains, requests a second.

    Attributes:
        token_s: seconds of a decode step on an idle engine.
    """

    setting: Setting
    runs: list[RunResult]
    rates: dict[tuple[str, int], float | None]
    token_s: float


def excess(goal: Goal, run: RunResult, token_s: float) -> float:
    """How many times its limit the figure is."""
    value = value_of(run, goal.path)
    if value is None:
        raise ValueError(f"{run.system} has no {goal.path}")
    if goal.steps is None:
        return (1 - value) / ALLOWED_MISSES
    return value / (1000 * goal.steps * token_s)


def measure(setting: Setting, figure: PaperFigure, args: argparse.Namespace) -> Measured:
    """Measure what is not there yet. Raises InputError for what cannot be measured."""
    words = ["--systems", *setting.systems, "--seeds", *map(str, args.seeds), *setting.options]
    words += ["--requests", str(args.requests or figure.requests), "--jobs", str(args.jobs)]
    folder: Path = args.out / setting.name
    experiment = experiment_of(parse_arguments([*words, "--out", str(folder)]))
    runs: dict[tuple[str, float | None, int], RunResult] = {}
    with tqdm(desc=setting.name, unit="point") as progress:
        points = Points(experiment, Store(folder, experiment.config), folder, progress)

        def measured(system: System, load: float | None, seed: int) -> RunResult:
            capacity = None if load is None else runs[BASELINE, None, seed]
            (run,) = points.measure([plan_of(experiment, system, load, seed, capacity)])
            runs[system.name, load, seed] = run
            return run

        with ThreadPoolExecutor(args.jobs) as threads:
            baseline = system_named(BASELINE)
            list(threads.map(lambda seed: measured(baseline, None, seed), args.seeds))
            idle = runs[BASELINE, None, args.seeds[0]].alone
            token_s = 0.0 if idle is None else idle.token_s
            jobs = [(system, seed) for seed in args.seeds for system in experiment.systems]
            loads = threads.map(
                lambda job: search(_probe(measured, *job, setting.goal, token_s)), jobs
            )
            rates = {
                (system.name, seed): load
                and load * runs[BASELINE, None, seed].figures["requests_per_s"]
                for (system, seed), load in zip(jobs, loads, strict=True)
            }
    return Measured(setting, list(runs.values()), rates, token_s)


def _probe(
    measured: Callable[[System, float | None, int], RunResult],
    system: System,
    seed: int,
    goal: Goal,
    token_s: float,
) -> Callable[[float], float]:
    return lambda load: excess(goal, measured(system, load, seed), token_s)
