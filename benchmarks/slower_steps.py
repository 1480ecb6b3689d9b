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
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from benchmarks.cli import Experiment, experiment_of, parse_arguments
from benchmarks.errors import InputError
from benchmarks.manifest import manifest, write_json
from benchmarks.systems import BASELINE
from benchmarks.validate import configuration_of, shape_of
from benchmarks.workload import all_present
from fastserve_vllm.policy.step_time import StepTimeModel
from fastserve_vllm.simulator.run import simulate
from fastserve_vllm.simulator.shape import EngineShape

PERCENT = (0, 2, 4, 6, 8)
# Title, figure, and the part of it where it has several.
_FIGURES = (
    ("output tokens/s", "output_tokens_per_s", None),
    ("TTFT mean", "ttft_ms", "mean"),
    ("normalized mean", "normalized_ms", "mean"),
    ("e2e mean", "e2e_ms", "mean"),
    ("e2e P99", "e2e_ms", "p99"),
)


def slower(shape: EngineShape, percent: float) -> EngineShape:
    """The same engine with longer steps."""
    seconds = [s * (1 + percent / 100) for s in shape.step_time.coefficients]
    return replace(shape, step_time=StepTimeModel(seconds, pinned=True))


def measure(experiment: Experiment) -> list[dict[str, Any]]:
    """Ratios to stock vLLM, of every seed, by load, system and how much longer its steps are."""
    shape, baseline = shape_of(experiment, ()), configuration_of(BASELINE, experiment)
    names = [system.name for system in experiment.systems if system.name != BASELINE]
    configs = {name: configuration_of(name, experiment) for name in names}
    ratios: dict[tuple[float, str, int], list[dict[str, float]]] = {}
    for seed in tqdm(experiment.args.seeds, unit="seed"):
        present = simulate(shape, baseline, all_present(experiment.workloads[seed]))
        for load in experiment.args.loads:
            if load is None:
                raise InputError("--all-at-once has no load: name some with --loads")
            requests = experiment.arriving(seed, load * present["requests_per_s"])
            base = _figures(simulate(shape, baseline, requests))
            for name, config in configs.items():
                for percent in PERCENT:
                    ours = _figures(simulate(slower(shape, percent), config, requests))
                    over = {title: ours[title] / base[title] for title in ours}
                    ratios.setdefault((load, name, percent), []).append(over)
    return [
        {"load": load, "system": name, "slower_percent": percent, "over_baseline": seeds}
        for (load, name, percent), seeds in ratios.items()
    ]


def _figures(figures: dict[str, Any]) -> dict[str, float]:
    return {
        title: figures[name] if part is None else figures[name][part]
        for title, name, part in _FIGURES
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Medians over seeds of the ratios."""
    cells = [
        [row["load"], row["system"], f"{row['slower_percent']} %"]
        + [
            f"{statistics.median(seed[title] for seed in row['over_baseline']):.3g}x"
            for title, _, _ in _FIGURES
        ]
        for row in rows
    ]
    headers = ["load", "system", "steps longer by", *(title for title, _, _ in _FIGURES)]
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)


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
    write_json(args.out / "slower_steps.json", document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
