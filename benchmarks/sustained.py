"""Which rate does each system sustain? Simulated, on the virtual clock.

    python -m benchmarks.sustained --workload alpaca --batch 64 --requests 1600 \
      --systems fastserve fastserve-paper fastserve-recompute --seeds 0 1 2 --out DIR

Takes the arguments of `benchmarks.run`. A rate is sustained while the mean normalized latency stays
within ten decode steps of an idle engine, the paper's target; rates are multiples of that of first
come, first served. The real engine's rates, at more cost: `benchmarks.figures`.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from benchmarks.alone import VIRTUAL
from benchmarks.cli import Experiment, experiment_of, parse_arguments
from benchmarks.errors import InputError
from benchmarks.figures.search import search
from benchmarks.manifest import manifest, write_json
from benchmarks.systems import BASELINE
from benchmarks.validate import configuration_of, shape_of
from benchmarks.workload import all_present
from fastserve_vllm.config import FastServeConfig
from fastserve_vllm.simulator.run import simulate

TARGET_STEPS = 10


class Bench:
    """Simulates one seed's requests on one engine."""

    def __init__(self, experiment: Experiment, seed: int) -> None:
        self._experiment = experiment
        self._seed = seed
        self._shape = shape_of(experiment, ())
        baseline = configuration_of(BASELINE, experiment)
        present = simulate(self._shape, baseline, all_present(experiment.workloads[seed]))
        self.capacity_rps: float = present["requests_per_s"]

    def load(self, config: FastServeConfig) -> float | None:
        """The load at which the system just keeps to the target; None: outside of the search."""
        return search(partial(self._excess, config))

    def _excess(self, config: FastServeConfig, load: float) -> float:
        requests = self._experiment.arriving(self._seed, load * self.capacity_rps)
        figures = simulate(self._shape, config, requests)
        limit_ms = 1000 * TARGET_STEPS * VIRTUAL.token_s
        return float(figures["normalized_ms"]["mean"]) / limit_ms


def measure(experiment: Experiment) -> list[dict[str, Any]]:
    """By system: the loads of the seeds, and each over the baseline's of that seed."""
    names = [BASELINE, *(s.name for s in experiment.systems if s.name != BASELINE)]
    configs = {name: configuration_of(name, experiment) for name in names}
    loads: dict[str, list[float | None]] = {name: [] for name in names}
    for seed in tqdm(experiment.args.seeds, unit="seed"):
        bench = Bench(experiment, seed)
        for name, config in configs.items():
            loads[name].append(bench.load(config))
    rows = []
    for name in names:
        pairs = zip(loads[name], loads[BASELINE], strict=True)
        ratios = [ours / theirs for ours, theirs in pairs if ours and theirs]
        rows.append({"system": name, "loads": loads[name], "over_baseline": ratios})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Medians over seeds, with their range."""
    cells = []
    for row in rows:
        known = [load for load in row["loads"] if load is not None]
        cells.append([row["system"], _spread(known), _spread(row["over_baseline"])])
    headers = ["system", "load sustained", f"over {BASELINE}"]
    return tabulate(cells, headers=headers, tablefmt="github")


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "outside of the search"
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and write the document; 2 for bad input."""
    args = parse_arguments(argv)
    try:
        experiment = experiment_of(args)
        rows = measure(experiment)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print(table(rows))
    document = {"manifest": manifest(experiment.config), "systems": rows}
    write_json(args.out / "sustained.json", document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
