"""The price of the first token, drawn: what each arrangement of the scheduler trades for what.

    python -m benchmarks.frontier --trace sharegpt.csv --name ShareGPT --out DIR
    python -m benchmarks.frontier --workload alpaca --name Alpaca --load 1.2 --out DIR
    python -m benchmarks.frontier --trace azure.csv --trace-arrivals --name "Azure" --out DIR

Simulates the objectives and sweeps over single fields of the configuration, on the virtual clock,
and draws two planes: token gap against end-to-end latency, normalized against end-to-end latency,
all over those of first come, first served on the same requests. `--points DIR` adds what the real
engine did, as measured by `benchmarks.run` on the same trace, load, batch and requests, and says
how far the simulator is off, and whether it ranks the measured systems as the engine does.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from tabulate import tabulate

from benchmarks.errors import InputError
from benchmarks.manifest import manifest, write_json
from benchmarks.oracle import SrptOracle, left_in_simulation
from benchmarks.result import value_of
from benchmarks.store import load_points
from benchmarks.workload import (
    Request,
    TraceRow,
    all_present,
    built_in,
    gamma_arrivals_s,
    load_trace,
    paper_filter,
    sample_requests,
    sample_window,
    scaled_to_rate,
    with_arrivals,
)
from fastserve_vllm.config import FastServeConfig
from fastserve_vllm.simulator.run import simulate, virtual_step_time
from fastserve_vllm.simulator.shape import EngineShape
from fastserve_vllm.workloads import WORKLOADS

mpl.use("Agg")
import matplotlib.pyplot as plt

FCFS = "fcfs"
ORACLE = "srpt-oracle"
# What knowing the lengths would be worth if everybody got a first token at once all the same.
FIRST_TOKENS_ORACLE = "first tokens, then srpt-oracle"
# Family, name, configuration. Families share a colour, and a line where they are sweeps.
ARRANGEMENTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("objectives", "balanced", {}),
    ("objectives", "smooth", {"objective": "smooth"}),
    ("objectives", "paper", {"objective": "paper"}),
    ("without skip-join", "mlfq", {"policy": "mlfq"}),
    *(("num_levels", f"{n} levels", {"num_levels": n}) for n in (3, 5, 6, 8, 9, 10)),
    *(("quantum_ratio", f"ratio {r:g}", {"quantum_ratio": r}) for r in (1.8, 2, 2.5)),
    *(("max_token_gap_s", f"gap {s:g} s", {"max_token_gap_s": s}) for s in (0.1, 0.2, 0.8, 1.6, 3)),
    *(("service_weight", f"weight {w}", {"service_weight": w}) for w in (0, 20, 300, 1000)),
    *(
        ("service_weight 300", f"{n} levels, weight 300", {"num_levels": n, "service_weight": 300})
        for n in (4, 5, 6)
    ),
    ("no ageing", "no ageing", {"starvation_limit_s": "off"}),
    # What the first token at once costs by itself.
    (
        "first tokens, then FCFS",
        "first tokens, then fcfs",
        {"num_levels": 2, "service_weight": 0, "starvation_limit_s": "off"},
    ),
    *(
        ("first_token_share", f"share {s:g}", {"first_token_share": s})
        for s in (0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5)
    ),
    (
        "6 levels, share 0.01",
        "6 levels, share 0.01",
        {"num_levels": 6, "first_token_share": 0.01},
    ),
    ("lengths not learned", "lengths not learned", {"learn_lengths": False}),
)
PATHS = {
    "TTFT mean": ("ttft_ms", "mean"),
    "TTFT P95": ("ttft_ms", "p95"),
    "normalized": ("normalized_ms", "mean"),
    "e2e mean": ("e2e_ms", "mean"),
    "e2e P99": ("e2e_ms", "p99"),
    "gap P95": ("longest_gap_ms", "p95"),
    "TTFT P95, longest tenth of prompts": ("long_prompts_ttft_ms", "p95"),
}
# Names of the measured systems, as those of simulated arrangements.
MEASURED = {
    "vllm-fcfs": FCFS,
    "fastserve": "balanced",
    "fastserve-smooth": "smooth",
    "fastserve-paper": "paper",
    "mlfq": "mlfq",
}
# Figures whose ratio is closer to 1 than this are a tie, in any order.
_TIE = 0.01
_BATCH_TOKENS, _BLOCK_TOKENS, _AMPLE_BLOCKS = 2048, 32, 1 << 20


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frontier")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=Path)
    source.add_argument("--workload", choices=sorted(WORKLOADS))
    parser.add_argument("--trace-arrivals", action="store_true")
    parser.add_argument("--name", required=True, help="title, and name of the files")
    parser.add_argument("--load", type=float, default=1.2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--points", type=Path, help="folder of measured points")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(argv)


def _shape(batch: int) -> EngineShape:
    return EngineShape(
        batch, _BATCH_TOKENS, _AMPLE_BLOCKS, _BLOCK_TOKENS, 0, virtual_step_time(), 0.0
    )


def _requests(
    rows: list[TraceRow], args: argparse.Namespace, seed: int
) -> tuple[list[Request], float]:
    """A seed's requests as they arrive, and the capacity that the load refers to."""
    sample = sample_window if args.trace_arrivals else sample_requests
    requests = sample(rows, args.requests, seed)
    config = FastServeConfig(policy="fcfs", swap_mode="recompute")
    capacity = simulate(_shape(args.batch), config, all_present(requests))["requests_per_s"]
    rate_rps = args.load * capacity
    if args.trace_arrivals:
        return scaled_to_rate(requests, rate_rps), capacity
    arrivals_s = gamma_arrivals_s(len(requests), rate_rps, 1.0, seed)
    return with_arrivals(requests, arrivals_s), capacity


def _one_seed(task: tuple[argparse.Namespace, list[TraceRow], int]) -> dict[str, dict[str, float]]:
    args, rows, seed = task
    requests, _ = _requests(rows, args, seed)
    shape = _shape(args.batch)
    tenth = float(np.quantile([request.prompt_tokens for request in requests], 0.9))
    run = partial(simulate, shape, requests=requests, long_prompt_tokens=tenth)
    fcfs = FastServeConfig(policy="fcfs", swap_mode="recompute")
    runs = {
        FCFS: run(config=fcfs),
        ORACLE: run(config=fcfs, policy=SrptOracle(left_in_simulation)),
        FIRST_TOKENS_ORACLE: run(
            config=fcfs, policy=SrptOracle(left_in_simulation, first_tokens=True)
        ),
    }
    for _, name, config in ARRANGEMENTS:
        runs[name] = run(config=FastServeConfig.parse({"swap_mode": "recompute", **config}))
    return {
        name: {title: figures[group][part] for title, (group, part) in PATHS.items()}
        for name, figures in runs.items()
    }


def relative(seeds: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians over seeds of the ratios to first come, first served; gaps in seconds."""
    return {
        name: {
            title: statistics.median(
                seed[name][title] / (1000 if title == "gap P95" else seed[FCFS][title])
                for seed in seeds
            )
            for title in PATHS
        }
        for name in seeds[0]
    }


def measured(folder: Path, load: float) -> dict[str, dict[str, float]]:
    """The same of points that the real engine left. Raises InputError for a folder without."""
    runs = [run for run in load_points(folder) if run.load == load]
    base = {run.seed: run for run in runs if run.system == "vllm-fcfs"}
    found: dict[str, dict[str, float]] = {}
    for system, name in MEASURED.items():
        own = [run for run in runs if run.system == system and run.seed in base]
        if own:
            found[name] = {
                title: statistics.median(
                    (value_of(run, f"{group}.{part}") or 0.0)
                    / (
                        1000
                        if title == "gap P95"
                        else value_of(base[run.seed], f"{group}.{part}") or 1.0
                    )
                    for run in own
                )
                for title, (group, part) in PATHS.items()
                if value_of(own[0], f"{group}.{part}") is not None
            }
    return found


def draw(
    simulated: dict[str, dict[str, float]],
    real: dict[str, dict[str, float]],
    title: str,
    path: Path,
) -> None:
    """Both planes in one picture."""
    figure, axes = plt.subplots(1, 2, figsize=(15, 5.2), layout="constrained")
    planes = (
        ("gap P95", "longest token gap, P95, seconds"),
        ("normalized", "normalized latency, over FCFS"),
    )
    for axis, (across, label) in zip(axes, planes, strict=True):
        _draw_plane(axis, simulated, real, across)
        axis.set(xlabel=label, ylabel="mean end-to-end latency, over FCFS", xscale="log")
        axis.grid(visible=True, alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_plane(
    axis: Any,
    simulated: dict[str, dict[str, float]],
    real: dict[str, dict[str, float]],
    across: str,
) -> None:
    families = dict.fromkeys(family for family, _, _ in ARRANGEMENTS)
    # As many colours as there are families.
    axis.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    for family in families:
        names = [name for other, name, _ in ARRANGEMENTS if other == family]
        points = sorted((simulated[name][across], simulated[name]["e2e mean"]) for name in names)
        marker = "o" if family == "objectives" else "."
        line = "" if family == "objectives" else "-"
        axis.plot(*zip(*points, strict=True), marker=marker, linestyle=line, label=family)
    for name, marker in ((FCFS, "s"), (ORACLE, "*"), (FIRST_TOKENS_ORACLE, "P")):
        axis.plot(simulated[name][across], simulated[name]["e2e mean"], marker, label=name)
    for name in (FCFS, ORACLE, "balanced", "smooth", "paper"):
        place = (simulated[name][across], simulated[name]["e2e mean"])
        below = name == "smooth"
        offset = (4, -12 if below else 4)
        axis.annotate(name, place, fontsize=8, xytext=offset, textcoords="offset points")
    for number, figures in enumerate(real.values()):
        label = "measured on the engine" if number == 0 else None
        axis.plot(figures[across], figures["e2e mean"], "kx", markersize=9, label=label)


def table(simulated: dict[str, dict[str, float]]) -> str:
    """Markdown: every arrangement."""
    rows = [[name, *(f"{figures[t]:.3g}" for t in PATHS)] for name, figures in simulated.items()]
    titles = [f"{t}, s" if t == "gap P95" else f"{t} / fcfs" for t in PATHS]
    return tabulate(rows, headers=["", *titles], tablefmt="github", disable_numparse=True)


def errors(simulated: dict[str, dict[str, float]], real: dict[str, dict[str, float]]) -> str:
    """Markdown: what was simulated over what was measured."""
    rows = [
        [name, *(f"{simulated[name][t] / figures[t] - 1:+.1%}" for t in figures)]
        for name, figures in real.items()
    ]
    titles = next(iter(real.values()))
    return tabulate(rows, headers=["simulated / measured", *titles], tablefmt="github")


def misranked(
    simulated: dict[str, dict[str, float]], real: dict[str, dict[str, float]]
) -> list[str]:
    """The figures of two systems that the simulator orders otherwise than the engine."""
    found = []
    for (one, first), (other, second) in itertools.combinations(real.items(), 2):
        for title in first:
            apart = first[title] / second[title] - 1
            predicted = simulated[one][title] / simulated[other][title] - 1
            if abs(apart) > _TIE and apart * predicted <= 0:
                found.append(f"{title}: {one} and {other}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Draw; 2 for bad input."""
    args = parse_arguments(argv)
    try:
        rows = built_in(args.workload) if args.workload else load_trace(args.trace)
        rows = paper_filter(rows)
        tasks = [(args, rows, seed) for seed in args.seeds]
        with ProcessPoolExecutor(args.jobs) as pool:
            seeds = list(pool.map(_one_seed, tasks))
        real = measured(args.points, args.load) if args.points else {}
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    simulated = relative(seeds)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = f"frontier_{args.name.lower().replace(' ', '_')}_b{args.batch}_load{args.load:g}"
    title = f"{args.name}, batch {args.batch}, load {args.load:g}, {args.requests} requests"
    draw(simulated, real, title, args.out / f"{stem}.png")
    config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "out"}
    config |= {"trace": args.trace.name if args.trace else None, "points": None}
    document = {"manifest": manifest(config), "simulated": simulated, "measured": real}
    write_json(args.out / f"{stem}.json", document)
    print(table(simulated))
    if real:
        wrong = "; ".join(misranked(simulated, real)) or "none"
        print(f"\n{errors(simulated, real)}\n\nMisranked: {wrong}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
