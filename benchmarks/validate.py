"""Does the simulator say what the engine does? Points measured on the engine, beside predictions.

    python -m benchmarks.validate --workload sharegpt --regime slots --clock wall --loads 0.9 1.2 \
      --systems vllm-fcfs fastserve --seeds 0 1 2 3 --out DIR

Takes the arguments of `benchmarks.run`, measures the points that are missing in DIR, and simulates
each of them. On the virtual clock it is known what steps and copies take. On the wall's, that is
fitted twice: to the very point that is predicted, which asks whether the simulator decides and
waits as the engine does; and, system by system, to the points of the first seed, from which the
other seeds are predicted: that holds as far as the machine keeps its speed.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.cli import Experiment, experiment_of, parse_arguments
from benchmarks.errors import InputError
from benchmarks.manifest import manifest, write_json
from benchmarks.result import RunResult, figure_at, value_of
from benchmarks.run import run
from benchmarks.step_fit import coefficients
from benchmarks.systems import BASELINE, system_named
from benchmarks.virtual_copies import block_seconds
from fastserve_vllm.config import FastServeConfig
from fastserve_vllm.policy.step_time import StepTimeModel
from fastserve_vllm.simulator.run import VIRTUAL_STEP, simulate
from fastserve_vllm.simulator.shape import EngineShape

PATHS = (
    *("ttft_ms.mean", "ttft_ms.p95", "normalized_ms.mean", "normalized_ms.p95"),
    *("e2e_ms.mean", "e2e_ms.p95", "longest_gap_ms.p95"),
)
_HOST_BLOCKS = 1 << 20
_KNOWN, _POINT, _FIRST_SEED = "known", "fitted to the point itself", "fitted to the first seed"


def configuration_of(system: str, experiment: Experiment) -> FastServeConfig:
    """The simulated system. Raises InputError for one that the simulator does not have."""
    if system == BASELINE:
        return FastServeConfig(policy="fcfs", swap_mode="recompute")
    found = system_named(system).configured(experiment.args.fastserve_config)
    if found.fastserve is None or found.oracle is not None:
        raise InputError(f"{system} cannot be simulated: it is not one of FastServe's policies")
    return FastServeConfig.parse(found.fastserve)


def shape_of(experiment: Experiment, fitted: Sequence[RunResult]) -> EngineShape:
    """The simulated engine; `fitted` are the points that say what steps and copies take."""
    shape = experiment.shape
    step, block_s = VIRTUAL_STEP, block_seconds(shape.block_size, experiment.args.copy_ratio)
    if experiment.clock == "wall":
        step = coefficients([point.wall["step_fit"] for point in fitted])
        copies = [p.wall["block_copy_ms"] for p in fitted if "block_copy_ms" in p.wall]
        block_s = statistics.fmean(copies) / 1000 if copies else 0.0
    return EngineShape(
        batch_limit=shape.batch,
        token_budget=shape.max_batched_tokens,
        # One block is vLLM's null block, which nobody uses.
        device_blocks=shape.kv_blocks - 1,
        block_tokens=shape.block_size,
        host_blocks=_HOST_BLOCKS,
        step_time=StepTimeModel(step, pinned=True),
        block_copy_s=block_s,
    )


def fits_of(experiment: Experiment) -> tuple[str, ...]:
    """What step times can be fitted to."""
    return (_POINT, _FIRST_SEED) if experiment.clock == "wall" else (_KNOWN,)


def compare(experiment: Experiment, runs: Sequence[RunResult], fit: str) -> list[dict[str, Any]]:
    """One row a point: what was predicted, measured, and the error.

    Args:
        experiment: what was run.
        runs: its points.
        fit: what step times are fitted to, of `fits_of`.
    """
    first = experiment.args.seeds[0]
    from_first = fit == _FIRST_SEED
    rows = []
    for point in runs:
        if point.load is None or point.rate_rps is None or (from_first and point.seed == first):
            continue
        fitted = [point]
        if from_first:
            fitted = [r for r in runs if r.system == point.system and r.seed == first and r.load]
        predicted = simulate(
            shape_of(experiment, fitted),
            configuration_of(point.system, experiment),
            experiment.arriving(point.seed, point.rate_rps),
        )
        row: dict[str, Any] = {"fit": fit, "system": point.system}
        row |= {"load": point.load, "seed": point.seed}
        for path in PATHS:
            measured, simulated = value_of(point, path), figure_at(predicted, path)
            if measured and simulated is not None:
                row[path] = {
                    "predicted": simulated,
                    "measured": measured,
                    "error": simulated / measured - 1,
                }
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Medians over seeds: predicted / measured (error)."""
    lines = []
    for load, system in sorted({(row["load"], row["system"]) for row in rows}):
        same = [row for row in rows if (row["load"], row["system"]) == (load, system)]
        cells = []
        for path in PATHS:
            found = [row[path] for row in same if path in row]
            if not found:
                cells.append("")
                continue
            predicted, measured, error = (
                statistics.median(f[name] for f in found)
                for name in ("predicted", "measured", "error")
            )
            cells.append(f"{predicted:.3g} / {measured:.3g} ({error:+.1%})")
        lines.append([f"{load:g}", system, *cells])
    return tabulate(lines, headers=["load", "system", *PATHS], tablefmt="github")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, and write every point beside its prediction; 2 for bad input."""
    args = parse_arguments(argv)
    try:
        experiment = experiment_of(args)
        for system in experiment.systems:
            configuration_of(system.name, experiment)
        with tempfile.TemporaryDirectory() as scratch:
            runs = run(experiment, args.logs or Path(scratch))
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    points = []
    for fit in fits_of(experiment):
        rows = compare(experiment, runs, fit)
        print(f"Step times: {fit}. Median over seeds: predicted / measured (error), ms.\n")
        print(table(rows), end="\n\n")
        points += rows
    document = {"manifest": manifest(experiment.config), "points": points}
    write_json(args.out / "validation.json", document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
