"""What the benches that only simulate have in common: one seed's engine, and their command."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.cli import Experiment, experiment_of, parse_arguments
from benchmarks.errors import InputError
from benchmarks.manifest import manifest, write_json
from benchmarks.systems import BASELINE
from benchmarks.validate import configuration_of, shape_of
from benchmarks.workload import Request, all_present
from fastserve_vllm.config import FastServeConfig
from fastserve_vllm.simulator.run import simulate

Rows = list[dict[str, Any]]


class Bench:
    """One seed's requests on one engine, and the capacity that loads refer to."""

    def __init__(self, experiment: Experiment, seed: int) -> None:
        self._experiment = experiment
        self._seed = seed
        self.shape = shape_of(experiment, ())
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


def run_bench(
    argv: Sequence[str] | None,
    file_name: str,
    measure: Callable[[Experiment], Rows],
    table: Callable[[Rows], str],
) -> int:
    """Take the arguments of `benchmarks.run`, print the table, write the rows; 2 for bad input."""
    args = parse_arguments(argv)
    try:
        experiment = experiment_of(args)
        rows = measure(experiment)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print(table(rows))
    document = {"manifest": manifest(experiment.config), "systems": rows}
    write_json(args.out / file_name, document)
    return 0
