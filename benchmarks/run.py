"""Measure systems on the installed vLLM: one command for every latency and throughput figure.

    python -m benchmarks.run --trace sharegpt.csv --systems vllm-fcfs fastserve --out results/slots
    python -m benchmarks.run --trace sharegpt.csv --regime idle --clock wall --out results/idle
    python -m benchmarks.run --trace sharegpt.csv --loads 1.2 --http --out results/http
    python -m benchmarks.run --trace sharegpt.csv --loads 1.2 --http --side-by-side --out results/2
    python -m benchmarks.run --trace sharegpt.csv --all-at-once --clock wall --out results/at-once

Each point (a system at a load with a seed) runs in processes of its own and becomes one JSON file;
points that are there already, measured in the same way, are not measured again. For each seed the
baseline comes first, with all requests present at the start: its request rate is the capacity
that loads refer to. Then, load by load, every system is measured, in an order that rotates from
seed to seed, so that a machine that grows slower or faster favours none of them. Side by side, the
systems of a load run at the same time, on a share of the cores each, which rotates likewise.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from operator import attrgetter
from pathlib import Path

from tqdm import tqdm

from benchmarks import in_process, over_http
from benchmarks.cli import Experiment, experiment_of, parse_arguments
from benchmarks.errors import InputError
from benchmarks.plan import Plan
from benchmarks.processes import each_in_fresh_process
from benchmarks.result import RunResult
from benchmarks.side_by_side import each_side_by_side
from benchmarks.store import Store
from benchmarks.systems import BASELINE, System, system_named
from benchmarks.tables import output_check, printed
from benchmarks.workload import all_present

Measure = Callable[[Plan], RunResult]


@dataclass(frozen=True)
class Points:
    """Measures points and keeps them; those that are there already are only read."""

    experiment: Experiment
    store: Store
    folder: Path
    progress: tqdm

    def measure(self, plans: Sequence[Plan]) -> list[RunResult]:
        """The plans' results, in order."""
        found = {self._key(plan): self._found(plan) for plan in plans}
        missing = [plan for plan in plans if found[self._key(plan)] is None]
        if self.experiment.args.side_by_side:
            # What ran beside another one is measured again beside it.
            loads = {plan.load for plan in missing}
            missing = [plan for plan in plans if plan.load in loads]
        self.progress.update(len(plans) - len(missing))
        for plan, run in zip(missing, self._each(missing), strict=True):
            self.store.save(run)
            found[self._key(plan)] = run
            self.progress.set_description(f"{run.system} seed {run.seed}")
            self.progress.update()
        return [run for run in found.values() if run is not None]

    def _found(self, plan: Plan) -> RunResult | None:
        if self.experiment.args.overwrite:
            return None
        return self.store.find(plan.system.name, plan.load, plan.seed)

    def _each(self, plans: Sequence[Plan]) -> Iterator[RunResult]:
        args = self.experiment.args
        if args.side_by_side:
            by_load = groupby(plans, key=attrgetter("load"))
            return chain.from_iterable(self._beside(list(together)) for _, together in by_load)
        if args.http:
            return (over_http.run_point(plan, self.folder) for plan in plans)
        # On the wall's clock a process owes nothing to another one.
        virtual = args.clock == "virtual"
        return each_in_fresh_process(in_process.run_point, plans, args.jobs, preloaded=virtual)

    def _beside(self, plans: Sequence[Plan]) -> list[RunResult]:
        """Measure plans at the same time; one alone, as a capacity is, beside others like it."""
        places = len(self.experiment.systems)
        together = [*plans, *plans[:1] * (places - len(plans))]
        return each_side_by_side(self._over_http_in, list(enumerate(together)))[: len(plans)]

    def _over_http_in(self, numbered: tuple[int, Plan]) -> RunResult:
        """Measure one of several at the same time, with files of its own."""
        number, plan = numbered
        folder = self.folder / f"share{number}"
        folder.mkdir(exist_ok=True)
        return over_http.run_point(plan, folder)

    @staticmethod
    def _key(plan: Plan) -> tuple[str, float | None, int]:
        return plan.system.name, plan.load, plan.seed


def plan_of(
    experiment: Experiment,
    system: System,
    load: float | None,
    seed: int,
    capacity: RunResult | None = None,
) -> Plan:
    """One point; `capacity` is the seed's baseline with all requests present at the start."""
    requests = tuple(all_present(experiment.workloads[seed]))
    rate_rps = None
    if load is not None and capacity is not None:
        rate_rps = load * capacity.figures["requests_per_s"]
        requests = experiment.arriving(seed, rate_rps)
    return Plan(
        system=system,
        shape=experiment.shape,
        requests=requests,
        seed=seed,
        clock=experiment.clock,
        load=load,
        rate_rps=rate_rps,
        alone=None if capacity is None else capacity.alone,
        copy_ratio=experiment.args.copy_ratio,
    )


def rotated(systems: Sequence[System], turns: int) -> list[System]:
    """The systems in order, beginning with another one at each turn."""
    first = turns % len(systems)
    return [*systems[first:], *systems[:first]]


def measure(experiment: Experiment, points: Points) -> list[RunResult]:
    """Every point of the experiment, the capacity of each seed included."""
    runs = []
    for turn, seed in enumerate(experiment.args.seeds):
        baseline = plan_of(experiment, system_named(BASELINE), None, seed)
        (capacity,) = points.measure([baseline])
        runs.append(capacity)
        plans = [
            plan_of(experiment, system, load, seed, capacity)
            for load in experiment.args.loads
            for system in rotated(experiment.systems, turn)
            if load is not None or system.name != BASELINE
        ]
        runs += points.measure(plans)
    return runs


def point_count(experiment: Experiment) -> int:
    """How many points an experiment has."""
    own = [s for s in experiment.systems if s.name != BASELINE or not experiment.args.all_at_once]
    return len(experiment.args.seeds) * (1 + len(own) * len(experiment.args.loads))


def run(experiment: Experiment, folder: Path) -> list[RunResult]:
    """Measure an experiment; datasets and logs go to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    store = Store(experiment.args.out, experiment.config)
    with tqdm(total=point_count(experiment), unit="point") as progress:
        return measure(experiment, Points(experiment, store, folder, progress))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0, or 1 where tokens are checked and differ, or 2 for bad input."""
    args = parse_arguments(argv)
    try:
        experiment = experiment_of(args)
        with tempfile.TemporaryDirectory() as scratch:
            runs = run(experiment, args.logs or Path(scratch))
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if not args.quiet:
        print(printed(runs))
    return 1 if args.check_tokens and not output_check(runs)["identical"] else 0


if __name__ == "__main__":
    sys.exit(main())
