"""What becomes of latency if a scheduler's steps take longer? Simulated, on the virtual clock.

    python -m benchmarks.slower_steps --trace sharegpt.csv --batch 16 --loads 1.2 1.0 \
      --seeds 0 1 2 3 4 --out DIR

Takes the arguments of `benchmarks.run`. Each system serves the same requests as stock vLLM, with
steps that are 0 to 8 % longer. Near capacity a small loss of speed is a large one of latency, under
any order: this tells the two apart in what was measured on the wall's clock.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from benchmarks.cli import Experiment
from benchmarks.errors import InputError
from benchmarks.result import figure_at
from benchmarks.simulated import Bench, Rows, configurations, run_bench
from benchmarks.systems import BASELINE
from fastserve_vllm.policy.step_time import StepTimeModel
from fastserve_vllm.simulator.run import simulate
from fastserve_vllm.simulator.shape import EngineShape

PERCENT = (0, 2, 4, 6, 8)
FIGURES = {
    "output tokens/s": "output_tokens_per_s",
    "TTFT mean": "ttft_ms.mean",
    "normalized mean": "normalized_ms.mean",
    "e2e mean": "e2e_ms.mean",
    "e2e P99": "e2e_ms.p99",
}


def slower(shape: EngineShape, percent: float) -> EngineShape:
    """The same engine with longer steps."""
    seconds = [s * (1 + percent / 100) for s in shape.step_time.coefficients]
    return replace(shape, step_time=StepTimeModel(seconds, pinned=True))


def measure(experiment: Experiment) -> Rows:
    """Ratios to stock vLLM, of every seed, by load, system and how much longer its steps are."""
    if experiment.args.all_at_once:
        raise InputError("--all-at-once has no load: name some with --loads")
    configs = configurations(experiment)
    baseline = configs.pop(BASELINE)
    ratios: dict[tuple[float, str, int], list[dict[str, float]]] = {}
    for seed in tqdm(experiment.args.seeds, unit="seed"):
        bench = Bench(experiment, seed)
        shapes = {percent: slower(bench.shape, percent) for percent in PERCENT}
        for load in experiment.args.loads:
            requests = bench.requests(load)
            base = simulate(bench.shape, baseline, requests)
            for (name, config), (percent, shape) in product(configs.items(), shapes.items()):
                over = _ratios(simulate(shape, config, requests), base)
                ratios.setdefault((load, name, percent), []).append(over)
    return [
        {"load": load, "system": name, "slower_percent": percent, "over_baseline": seeds}
        for (load, name, percent), seeds in ratios.items()
    ]


def _ratios(ours: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    return {title: figure_at(ours, path) / figure_at(base, path) for title, path in FIGURES.items()}


def table(rows: Rows) -> str:
    """Medians over seeds of the ratios."""
    cells = [
        [row["load"], row["system"], f"{row['slower_percent']} %"]
        + [
            f"{statistics.median(seed[title] for seed in row['over_baseline']):.3g}x"
            for title in FIGURES
        ]
        for row in rows
    ]
    headers = ["load", "system", "steps longer by", *FIGURES]
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and write the document; 2 for bad input."""
    return run_bench(argv, "slower_steps.json", measure, table)


if __name__ == "__main__":
    sys.exit(main())
