"""What becomes of latency if a scheduler's steps take longer? Simulated, on the virtual clock.

    python -m benchmarks.slower_steps --trace sharegpt.csv --batch 16 --loads 1.2 1.0 \
      --seeds 0 1 2 3 4 --out DIR

Takes the arguments of `benchmarks.run`. Each system serves the same requests as stock vLLM, with
steps that are 0 to 8 % longer. Near capacity a small loss of speed is a large one of latency, under
any order: this tells the two apart in what was measured on the wall's clock. All of that on three
engines, one as fast as the virtual clock says, the others 4 and 10 times as slow: what a scheduler
promises in seconds, as a gap bound is, is worth fewer steps there.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from itertools import product
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from benchmarks.cli import Experiment
from benchmarks.errors import InputError
from benchmarks.result import figure_at
from benchmarks.simulated import Bench, Rows, configurations, run_bench, stretched
from benchmarks.systems import BASELINE
from fastserve_vllm.policy.step_time import StepShape
from fastserve_vllm.simulator.run import simulate

# Of the engine itself, under both schedulers.
SLOWER_TIMES = (1, 4, 10)
PERCENT = (0, 1, 2, 4, 6, 8)
FIGURES = {
    "output tokens/s": "output_tokens_per_s",
    "TTFT mean": "ttft_ms.mean",
    "normalized mean": "normalized_ms.mean",
    "e2e mean": "e2e_ms.mean",
    "e2e P99": "e2e_ms.p99",
}


def measure(experiment: Experiment) -> Rows:
    """Ratios to stock vLLM, of every seed, by load, engine, system and how much longer its steps.

    `full_step_ms` is a decode step of a full batch on that engine, under stock vLLM.
    """
    if experiment.args.all_at_once:
        raise InputError("--all-at-once has no load: name some with --loads")
    configs = configurations(experiment)
    baseline = configs.pop(BASELINE)
    ratios: dict[tuple[float, float, str, int], list[dict[str, float]]] = {}
    engines = list(product(experiment.args.seeds, SLOWER_TIMES))
    for seed, times in tqdm(engines, unit="engine"):
        bench = Bench(experiment, seed, times)
        shapes = {percent: stretched(bench.shape, 1 + percent / 100) for percent in PERCENT}
        full = StepShape(prefill_tokens=0, decodes=bench.shape.batch_limit)
        step_ms = round(1000 * bench.shape.step_time.predict_s(full), 3)
        for load in experiment.args.loads:
            requests = bench.requests(load)
            base = simulate(bench.shape, baseline, requests)
            for (name, config), (percent, shape) in product(configs.items(), shapes.items()):
                over = _ratios(simulate(shape, config, requests), base)
                ratios.setdefault((load, step_ms, name, percent), []).append(over)
    names = ("load", "full_step_ms", "system", "slower_percent")
    return [
        {**dict(zip(names, point, strict=True)), "over_baseline": seeds}
        for point, seeds in ratios.items()
    ]


def _ratios(ours: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    return {title: figure_at(ours, path) / figure_at(base, path) for title, path in FIGURES.items()}


def table(rows: Rows) -> str:
    """Medians over seeds of the ratios."""
    cells = [
        [
            row["load"],
            row["system"],
            f"{row['full_step_ms']:.3g} ms",
            f"{row['slower_percent']} %",
        ]
        + [
            f"{statistics.median(seed[title] for seed in row['over_baseline']):.3g}x"
            for title in FIGURES
        ]
        for row in rows
    ]
    headers = ["load", "system", "full step", "steps longer by", *FIGURES]
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and write the document; 2 for bad input."""
    return run_bench(argv, "slower_steps.json", measure, table)


if __name__ == "__main__":
    sys.exit(main())
