"""What the command lines of the benchmarks share: arguments, workload and printed report."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.engine import EngineShape, ample_kv_blocks
from benchmarks.manifest import fingerprint, manifest, write_json
from benchmarks.metrics import Figures
from benchmarks.model import model_folder
from benchmarks.report import (
    SLOWDOWN_COLUMNS,
    RunResult,
    markdown_table,
    output_check,
    summary,
    sustained_rates,
)
from benchmarks.systems import BASELINE
from benchmarks.workload import (
    Request,
    TraceRow,
    gamma_arrivals_s,
    load_trace,
    paper_filter,
    sample_requests,
    sample_window,
    scaled_to_rate,
    with_arrivals,
)


def workload_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that both virtual and wall-clock benchmarks take."""
    parser.add_argument("--trace", type=Path, required=True, help="CSV of request lengths")
    parser.add_argument("--model", type=Path, help="model folder (default: a seeded tiny model)")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16, help="batch limit of the engine")
    parser.add_argument("--kv-blocks", type=int, help="KV blocks (default: enough for everything)")
    parser.add_argument("--block-size", type=int, default=32, help="tokens per KV block")
    parser.add_argument("--systems", nargs="+", default=[BASELINE, "fastserve"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--cv", type=float, default=1.0, help="variation of the arrival gaps; 1 is Poisson"
    )
    parser.add_argument(
        "--trace-arrivals", action="store_true", help="the trace's own arrivals, scaled to the load"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")


def with_baseline(names: Sequence[str]) -> list[str]:
    """The systems to run: the baseline first and always, each once."""
    return list(dict.fromkeys([BASELINE, *names]))


def sampled_workloads(
    trace: Path, count: int, seeds: Sequence[int], own_arrivals: bool
) -> dict[int, list[Request]]:
    """One filtered sample of a trace per seed, with the trace's own arrivals or all at 0."""
    rows: list[TraceRow] = paper_filter(load_trace(trace))
    sample = sample_window if own_arrivals else sample_requests
    return {seed: sample(rows, count, seed) for seed in seeds}


def arriving_at(
    requests: Sequence[Request], rate_rps: float, seed: int, args: argparse.Namespace
) -> list[Request]:
    """Let a sample arrive at a rate, as the command line says."""
    if args.trace_arrivals:
        return scaled_to_rate(requests, rate_rps)
    return with_arrivals(requests, gamma_arrivals_s(len(requests), rate_rps, args.cv, seed))


def engine_shape(args: argparse.Namespace, workloads: dict[int, list[Request]]) -> EngineShape:
    """The engine's size, the same for every seed and system."""
    shape = EngineShape(model_folder(args.model), args.batch, 1 << 16, args.block_size)
    ample = max(
        ample_kv_blocks(requests, shape.block_size, shape.max_model_len)
        for requests in workloads.values()
    )
    blocks = args.kv_blocks if args.kv_blocks is not None else ample
    return EngineShape(shape.model, shape.batch, blocks, shape.block_size)


def configuration(args: argparse.Namespace, shape: EngineShape, clock: str) -> dict[str, Any]:
    """Everything that decides the numbers, for the manifest."""
    model = json.loads((shape.model / "config.json").read_text(encoding="utf-8"))
    skipped = {"trace", "model", "output", "logs"}
    return {
        "clock": clock,
        "trace": fingerprint(args.trace),
        "arguments": {key: value for key, value in vars(args).items() if key not in skipped},
        "engine": shape.arguments(),
        "model": model,
        "model_weights": fingerprint(shape.model / "model.safetensors"),
    }


def result_document(
    runs: Sequence[RunResult], config: dict[str, Any], extra: Figures
) -> dict[str, Any]:
    """The whole result as it is written."""
    return {
        "manifest": manifest(config),
        **extra,
        "output_check": output_check(runs),
        "summary": summary(runs),
        "runs": [run.document() for run in runs],
    }


def headline(runs: Sequence[RunResult], target_ms: float) -> dict[str, Any]:
    """Rate sustained at the normalized-latency target, by system."""
    return {"target_normalized_ms": target_ms, "systems": sustained_rates(runs, target_ms)}


def finish(document: dict[str, Any], runs: Sequence[RunResult], output: Path | None) -> int:
    """Print the table, write the JSON, and return the exit status: 1 if outputs differ."""
    print(markdown_table(runs))
    print(f"\n{markdown_table(runs, SLOWDOWN_COLUMNS)}")
    check = document["output_check"]
    verdict = "identical" if check["identical"] else f"DIFFERENT: {check['differing'][:10]}"
    print(f"\noutputs of {check['requests']} requests in {check['runs']} runs: {verdict}")
    if output is not None:
        write_json(output, document)
    return 0 if check["identical"] else 1
