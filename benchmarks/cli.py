"""The command line of `benchmarks.run`, and the experiment that it describes."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine import EngineShape
from benchmarks.manifest import fingerprint
from benchmarks.model import model_folder
from benchmarks.plan import ClockName
from benchmarks.processes import in_fresh_process, platform_is_cuda_alike
from benchmarks.regimes import REGIMES, ample_kv_blocks, kv_demand, short_kv_blocks
from benchmarks.systems import BASELINE, SYSTEMS, System, check_runnable, system_named
from benchmarks.virtual_copies import COPY_RATIO
from benchmarks.workload import (
    Request,
    TraceRow,
    built_in,
    gamma_arrivals_s,
    load_trace,
    paper_filter,
    sample_requests,
    sample_window,
    scaled,
    scaled_to_rate,
    with_arrivals,
)
from fastserve_vllm.workloads import WORKLOADS


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; a regime fills in what is not given."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.http and args.clock == "virtual":
        parser.error("--http runs on the wall's clock")
    if args.jobs > 1 and (args.http or args.clock == "wall"):
        parser.error("--jobs: points on the wall's clock run one at a time")
    if args.side_by_side and (not args.http or args.all_at_once):
        parser.error("--side-by-side is for --http with --loads")
    if args.pace is not None and not args.http:
        parser.error("--pace is for --http")
    if args.all_at_once and args.loads:
        parser.error("--all-at-once and --loads exclude each other")
    args.clock = "wall" if args.http else args.clock or "virtual"
    regime = REGIMES[args.regime]
    args.batch = args.batch or regime.batch
    args.loads = [None] if args.all_at_once else args.loads or list(regime.loads)
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Measure systems over loads and seeds; one JSON file a point.",
        epilog="systems: " + "; ".join(f"{s.name}: {s.what}" for s in SYSTEMS.values()),
    )
    _add_what(parser)
    _add_how(parser)
    return parser


def _add_what(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is measured")
    group.add_argument("--systems", nargs="+", default=[BASELINE, "fastserve"], metavar="NAME")
    lengths = group.add_mutually_exclusive_group(required=True)
    lengths.add_argument("--workload", choices=WORKLOADS, help="built-in request lengths")
    lengths.add_argument("--trace", type=Path, help="CSV of request lengths")
    group.add_argument(
        "--regime",
        choices=REGIMES,
        default="slots",
        help="defaults of batch, loads and KV blocks: "
        + "; ".join(f"{name}: {regime.what}" for name, regime in REGIMES.items()),
    )
    group.add_argument("--loads", type=_positive, nargs="+", help="arrival rates over capacity")
    group.add_argument(
        "--all-at-once", action="store_true", help="all requests present at the start"
    )
    group.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    group.add_argument("--requests", type=count, default=400)
    group.add_argument("--batch", type=count, help="batch limit of the engine")
    group.add_argument("--kv-blocks", type=count, help="KV blocks of the engine")
    group.add_argument("--block-size", type=count, default=32, help="tokens per KV block")
    for side in ("prompts", "outputs"):
        group.add_argument(
            f"--scale-{side}",
            type=_positive,
            default=1.0,
            metavar="FACTOR",
            help="make them longer",
        )
    group.add_argument(
        "--cv", type=_positive, default=1.0, help="variation of the arrival gaps; 1 is Poisson"
    )
    group.add_argument(
        "--trace-arrivals", action="store_true", help="the trace's own arrivals, scaled to the load"
    )
    group.add_argument("--model", type=Path, help="model folder (default: a seeded tiny model)")
    group.add_argument(
        "--fastserve-config", type=json_object, default={}, help="for FastServe systems, JSON"
    )
    group.add_argument(
        "--engine-args", type=json_object, default={}, help="further engine arguments, JSON"
    )


def _add_how(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how it is measured")
    group.add_argument("--clock", choices=("virtual", "wall"), help="default: virtual")
    group.add_argument("--http", action="store_true", help="vllm serve and vllm bench serve")
    group.add_argument(
        "--side-by-side",
        action="store_true",
        help="--http: the systems of a load at the same time, a share of the cores each",
    )
    group.add_argument(
        "--pace",
        type=_positive,
        metavar="TIMES",
        help="--http: steps last so many times as long as on the virtual clock, and leave the CPU "
        "free until then, as an accelerator's do",
    )
    group.add_argument(
        "--copy-ratio",
        type=_positive,
        default=COPY_RATIO,
        help="virtual clock: seconds of copying a token's KV over those of prefilling it",
    )
    group.add_argument("--jobs", type=count, default=1, help="virtual points at the same time")
    group.add_argument("--out", type=Path, required=True, help="folder of the points")
    group.add_argument(
        "--overwrite", action="store_true", help="measure again what is there already"
    )
    group.add_argument("--quiet", action="store_true", help="print no tables")
    group.add_argument("--logs", type=Path, help="--http: folder for datasets and server logs")
    group.add_argument(
        "--check-tokens", action="store_true", help="exit 1 if systems generate different tokens"
    )


def _positive(text: str) -> float:
    value = _number(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def count(text: str) -> int:
    """A whole number above 0, of a command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text}")
    return int(text)


def json_object(text: str) -> dict[str, Any]:
    """An argument's type; argparse reports what is not a JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"a JSON object is expected, got {text}")
    return value


@dataclass(frozen=True)
class Experiment:
    """Everything that its points share.

    Attributes:
        systems: those that are asked for, in order.
        workloads: by seed; requests arrive at 0, or as in the trace.
        config: what decides the numbers, as it is written with every point.
    """

    args: argparse.Namespace
    clock: ClockName
    systems: tuple[System, ...]
    shape: EngineShape
    workloads: dict[int, list[Request]]
    config: dict[str, Any]

    def arriving(self, seed: int, rate_rps: float) -> tuple[Request, ...]:
        """A seed's requests at a rate."""
        requests = self.workloads[seed]
        if self.args.trace_arrivals:
            return tuple(scaled_to_rate(requests, rate_rps))
        arrivals_s = gamma_arrivals_s(len(requests), rate_rps, self.args.cv, seed)
        return tuple(with_arrivals(requests, arrivals_s))


def experiment_of(args: argparse.Namespace) -> Experiment:
    """Read the trace, size the engine, and check that every system can run.

    Raises InputError for what cannot be measured.
    """
    systems = _systems(args)
    rows = built_in(args.workload) if args.workload else load_trace(args.trace)
    rows = paper_filter(scaled(rows, args.scale_prompts, args.scale_outputs))
    sample = sample_window if args.trace_arrivals else sample_requests
    workloads = {seed: sample(rows, args.requests, seed) for seed in args.seeds}
    shape = _shape(args, rows, workloads)
    demand = kv_demand(rows, shape.batch, shape.block_size)
    config = _config(args, shape, demand)
    return Experiment(args, args.clock, systems, shape, workloads, config)


def _systems(args: argparse.Namespace) -> tuple[System, ...]:
    names = dict.fromkeys(args.systems)
    systems = tuple(system_named(name).configured(args.fastserve_config) for name in names)
    for system in systems:
        check_runnable(
            system,
            http=args.http,
            is_cuda_alike=lambda: in_fresh_process(platform_is_cuda_alike, None),
        )
    return systems


def _shape(
    args: argparse.Namespace, rows: Sequence[TraceRow], workloads: dict[int, list[Request]]
) -> EngineShape:
    share, block_size, max_len = REGIMES[args.regime].kv_share, args.block_size, 2048
    if args.kv_blocks is not None:
        blocks = args.kv_blocks
    elif share is not None:
        demand = kv_demand(rows, args.batch, block_size)
        blocks = short_kv_blocks(share, demand, block_size, max_len)
    else:
        blocks = ample_kv_blocks(rows, workloads.values(), block_size, max_len)
    return EngineShape(
        model_folder(args.model),
        args.batch,
        blocks,
        block_size,
        max_len,
        further=args.engine_args,
        pace=args.pace,
    )


def _config(args: argparse.Namespace, shape: EngineShape, demand: int) -> dict[str, Any]:
    model = json.loads((shape.model / "config.json").read_text(encoding="utf-8"))
    weights = shape.model / "model.safetensors"
    return {
        "clock": args.clock,
        "http": args.http,
        # Left out elsewhere: what was measured before these choices stays comparable.
        **({"side_by_side": True} if args.side_by_side else {}),
        **({} if args.pace is None else {"pace": args.pace}),
        "regime": args.regime,
        "trace": {"built_in": args.workload} if args.workload else fingerprint(args.trace),
        "scale": {"prompts": args.scale_prompts, "outputs": args.scale_outputs},
        "requests": args.requests,
        "arrivals": "trace" if args.trace_arrivals else {"gamma_cv": args.cv},
        "engine": shape.arguments(),
        "kv_demand_blocks": demand,
        "kv_blocks_over_demand": shape.kv_blocks / demand,
        "fastserve_config": args.fastserve_config,
        "copy_ratio": args.copy_ratio if args.clock == "virtual" else None,
        "model": model,
        "model_weights": fingerprint(weights) if weights.is_file() else None,
    }
