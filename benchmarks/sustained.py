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

from tabulate import tabulate
from tqdm import tqdm

from benchmarks.alone import VIRTUAL
from benchmarks.cli import Experiment
from benchmarks.figures.search import search
from benchmarks.simulated import Bench, Rows, configurations, run_bench
from benchmarks.systems import BASELINE
from fastserve_vllm.config import FastServeConfig
from fastserve_vllm.simulator.run import simulate

TARGET_STEPS = 10


def sustained_load(bench: Bench, config: FastServeConfig) -> float | None:
    """The load at which the system just keeps to the target; None: outside of the search."""
    return search(partial(_excess, bench, config))


def _excess(bench: Bench, config: FastServeConfig, load: float) -> float:
    figures = simulate(bench.shape, config, bench.requests(load))
    limit_ms = 1000 * TARGET_STEPS * VIRTUAL.token_s
    return float(figures["normalized_ms"]["mean"]) / limit_ms


def measure(experiment: Experiment) -> Rows:
    """By system: the loads of the seeds, and each over the baseline's of that seed."""
    configs = configurations(experiment)
    loads: dict[str, list[float | None]] = {name: [] for name in configs}
    for seed in tqdm(experiment.args.seeds, unit="seed"):
        bench = Bench(experiment, seed)
        for name, config in configs.items():
            loads[name].append(sustained_load(bench, config))
    rows = []
    for name in configs:
        pairs = zip(loads[name], loads[BASELINE], strict=True)
        ratios = [ours / theirs for ours, theirs in pairs if ours and theirs]
        rows.append({"system": name, "loads": loads[name], "over_baseline": ratios})
    return rows


def table(rows: Rows) -> str:
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
    return run_bench(argv, "sustained.json", measure, table)


if __name__ == "__main__":
    sys.exit(main())
