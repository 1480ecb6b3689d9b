"""What the benches that only simulate have in common: one seed's engine, and their command."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.cli import Experiment, experiment_of, parse_arguments
from benchmarks.errors import InputError
from benchmarks.manifest import manifest, write_json
from benchmarks.systems import BASELINE
from benchmarks.validate import configuration_of, shape_of
from benchmarks.workload import Request, all_present
from fastserve_vllm.config import FastServeConfig
from fastserve_vllm.policy.step_time import StepTimeModel
from fastserve_vllm.simulator.run import simulate
from fastserve_vllm.simulator.shape import EngineShape

Rows = list[dict[str, Any]]


def stretched(shape: EngineShape, factor: float) -> EngineShape:
    """The same engine with all steps longer by a factor."""
    seconds = [s * factor for s in shape.step_time.coefficients]
    return replace(shape, step_time=StepTimeModel(seconds, pinned=True))


class Bench:
    """One seed's requests on one engine, and the capacity that loads refer to.

    Args:
        experiment: what is measured.
        seed: of the requests.
        stretch: how many times as long as on the virtual clock the engine's steps are.
    """

    def __init__(self, experiment: Experiment, seed: int, stretch: float = 1.0) -> None:
        self._experiment = experiment
        self._seed = seed
        self.shape = stretched(shape_of(experiment, ()), stretch)
        baseline = configuration_of(BASELINE, experiment)
        present = simulate(self.shape, baseline, all_present(experiment.workloads[seed]))
        self.capacity_rps: float = present["requests_per_s"]

    def requests(self, load: float) -> tuple[Request, ...]:
        """The requests as they arrive at a load."""
        return self._experiment.arriving(self._seed, load * self.capacity_rps)


def configurations(experiment: Experiment) -> dict[str, FastServeConfig]:
    """By system, the baseline first. Raises InputError for one that cannot be simulated."""
    names = [BASELINE, *(s.name for s in experiment.systems if s.name != BASELINE)]
    return {name: configuration_of(name, experiment) for name in names}


def _simulated(experiment: Experiment) -> Experiment:
    if experiment.clock == "wall":
        raise InputError("--clock, --http: this bench simulates, on the virtual clock only")
    return experiment


def run_bench(
    argv: Sequence[str] | None,
    file_name: str,
    measure: Callable[[Experiment], Rows],
    table: Callable[[Rows], str],
) -> int:
    """Take the arguments of `benchmarks.run`, print the table, write the rows; 2 for bad input."""
    args = parse_arguments(argv)
    try:
        experiment = _simulated(experiment_of(args))
        rows = measure(experiment)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print(table(rows))
    document = {"manifest": manifest(experiment.config), "systems": rows}
    write_json(args.out / file_name, document)
    return 0
