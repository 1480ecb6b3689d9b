"""Measures a figure's settings: capacity first, then each system's search for its rate."""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.alone import VIRTUAL
from benchmarks.cli import Experiment, experiment_of, parse_arguments
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


class Campaign:
    """Measures a setting's points, one at a time in each thread; `runs` holds them."""

    def __init__(self, experiment: Experiment, points: Points) -> None:
        self._experiment = experiment
        self._points = points
        self.runs: dict[tuple[str, float | None, int], RunResult] = {}

    def point(self, system: System, load: float | None, seed: int) -> RunResult:
        """A point; those with a load need the seed's capacity first."""
        capacity = None if load is None else self.runs[BASELINE, None, seed]
        (run,) = self._points.measure([plan_of(self._experiment, system, load, seed, capacity)])
        self.runs[system.name, load, seed] = run
        return run

    def capacity(self, seed: int) -> RunResult:
        """The baseline with all requests present at the start."""
        return self.point(system_named(BASELINE), None, seed)

    def rate(self, goal: Goal, token_s: float, system: System, seed: int) -> float | None:
        """Requests a second at which the system just keeps to the goal."""
        load = search(lambda load: excess(goal, self.point(system, load, seed), token_s))
        per_s: float = self.runs[BASELINE, None, seed].figures["requests_per_s"]
        return None if load is None else load * per_s


def measure(setting: Setting, figure: PaperFigure, args: argparse.Namespace) -> Measured:
    """Measure what is not there yet. Raises InputError for what cannot be measured."""
    words = ["--systems", *setting.systems, "--seeds", *map(str, args.seeds), *setting.options]
    words += ["--requests", str(args.requests or figure.requests), "--jobs", str(args.jobs)]
    folder: Path = args.out / setting.name
    experiment = experiment_of(parse_arguments([*words, "--out", str(folder)]))
    store = Store(folder, experiment.config)
    with (
        tqdm(desc=setting.name, unit="point") as progress,
        ThreadPoolExecutor(args.jobs) as threads,
    ):
        campaign = Campaign(experiment, Points(experiment, store, folder, progress))
        first, *_ = threads.map(campaign.capacity, args.seeds)
        token_s = (first.alone or VIRTUAL).token_s
        jobs = [(system, seed) for seed in args.seeds for system in experiment.systems]
        found = threads.map(lambda job: campaign.rate(setting.goal, token_s, *job), jobs)
        rates = {(job[0].name, job[1]): rate for job, rate in zip(jobs, found, strict=True)}
    return Measured(setting, list(campaign.runs.values()), rates, token_s)
