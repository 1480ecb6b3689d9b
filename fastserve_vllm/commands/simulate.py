"""`fastserve simulate`: what a policy would do with a trace, without an engine."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from fastserve_vllm.config import POLICY_NAMES, ConfigError, FastServeConfig
from fastserve_vllm.policy.step_time import StepTimeModel, load_profile
from fastserve_vllm.simulator.run import capacity_rps, simulate, virtual_step_time
from fastserve_vllm.simulator.shape import EngineShape
from fastserve_vllm.traces import (
    InputError,
    Request,
    TraceRow,
    built_in,
    load_trace,
    paper_filter,
    sample_window,
    scaled_to_rate,
    stream_requests,
)
from fastserve_vllm.workloads import WORKLOADS

OBJECTIVES = ("balanced", "smooth", "paper")
COLUMNS = (
    ("TTFT mean ms", "ttft_ms", "mean"),
    ("TTFT P95 ms", "ttft_ms", "p95"),
    ("normalized ms", "normalized_ms", "mean"),
    ("e2e mean ms", "e2e_ms", "mean"),
    ("e2e P99 ms", "e2e_ms", "p99"),
    ("longest gap P95 ms", "longest_gap_ms", "p95"),
)


def _positive(_ctx: click.Context, _param: click.Parameter, value: float | None) -> float | None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise click.BadParameter(f"must be a finite number above 0, got {value}")
    return value


def _configuration(text: str, common: dict[str, Any]) -> FastServeConfig:
    """A policy, an objective, or JSON."""
    own: dict[str, Any]
    if text in POLICY_NAMES:
        own = {"policy": text}
    elif text in OBJECTIVES:
        own = {"objective": text}
    else:
        own = _json_object(text)
    if own.get("policy") == "fcfs":
        # Nobody is preempted, so nothing is swapped: this is stock vLLM.
        own.setdefault("swap_mode", "recompute")
    try:
        return FastServeConfig.parse({**common, **own})
    except ConfigError as error:
        raise click.ClickException(str(error)) from None


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        names = ", ".join((*POLICY_NAMES, *OBJECTIVES))
        raise click.ClickException(f"{text!r} is neither one of {names} nor a JSON object")
    return value


@click.command()
@click.option("--workload", type=click.Choice(sorted(WORKLOADS)), help="Built-in lengths.")
@click.option(
    "--trace",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="CSV of prompt and output lengths, as for the benchmarks.",
)
@click.option("--trace-arrivals", is_flag=True, help="The trace's own arrivals, scaled.")
@click.option(
    "--policy", default="fastserve", show_default=True, help="Policy, objective, or JSON."
)
@click.option("--compare", multiple=True, help="Another one; may be given several times.")
@click.option("--load", type=float, callback=_positive, help="Arrival rate over capacity.")
@click.option("--rate", type=float, callback=_positive, help="Arrivals a second, instead.")
@click.option("--cv", type=float, default=1.0, callback=_positive, help="Burstiness; 1 is Poisson.")
@click.option("--requests", type=click.IntRange(1), default=2000, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True)
@click.option("--token-budget", type=click.IntRange(1), default=2048, show_default=True)
@click.option("--block-tokens", type=click.IntRange(1), default=32, show_default=True)
@click.option("--device-blocks", type=click.IntRange(1), default=1 << 20, help="KV blocks.")
@click.option("--host-blocks", type=click.IntRange(0), default=1 << 20, help="KV blocks.")
@click.option(
    "--copy-ratio",
    type=click.FloatRange(0),
    default=0.1,
    show_default=True,
    help="Seconds of copying a token's KV over those of prefilling it.",
)
@click.option(
    "--step-time-profile",
    type=click.Path(exists=True, dir_okay=False),
    help="What steps take: a profile saved by --fastserve-config.save_step_time_profile. Without, "
    "the benchmarks' virtual clock.",
)
@click.option("--config", default="{}", help="Further FastServe configuration for all, JSON.")
@click.option("--json", "output", type=click.Path(dir_okay=False, path_type=Path), help="Write.")
def command(
    *,
    workload: str | None,
    trace: Path | None,
    policy: str,
    compare: tuple[str, ...],
    load: float | None,
    rate: float | None,
    output: Path | None,
    **options: Any,
) -> None:
    """Simulate policies on a trace: the live scheduler's own decisions, in simulated time."""
    if (workload is None) == (trace is None):
        raise click.UsageError("give one of --workload and --trace")
    if load is not None and rate is not None:
        raise click.UsageError("give one of --load and --rate")
    common = _json_object(options["config"])
    configurations = {name: _configuration(name, common) for name in (policy, *compare)}
    try:
        rows = built_in(workload) if workload is not None else _rows(trace)
        shape = _shape(options)
        capacity = capacity_rps(shape, rows, options["seed"])
        rate_rps = rate or (load or 1.0) * capacity
        results = {
            name: simulate(shape, config, _requests(rows, rate_rps, options))
            for name, config in configurations.items()
        }
    except (InputError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    _show(results, rate_rps, capacity)
    if output is not None:
        document = {"rate_rps": rate_rps, "capacity_rps": capacity, "systems": results}
        output.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _rows(trace: Path | None) -> list[TraceRow]:
    rows = paper_filter(load_trace(trace or Path()))
    if not rows:
        raise InputError(f"{trace} holds no request that the paper's filter keeps")
    return rows


def _shape(options: dict[str, Any]) -> EngineShape:
    profile = options["step_time_profile"]
    step_time: StepTimeModel = load_profile(profile) if profile else virtual_step_time()
    block_tokens: int = options["block_tokens"]
    return EngineShape(
        batch_limit=options["batch"],
        token_budget=options["token_budget"],
        device_blocks=options["device_blocks"],
        block_tokens=block_tokens,
        host_blocks=options["host_blocks"],
        step_time=step_time,
        block_copy_s=options["copy_ratio"] * step_time.prefill_token_s * block_tokens,
    )


def _requests(rows: list[TraceRow], rate_rps: float, options: dict[str, Any]) -> Iterator[Request]:
    count, seed = options["requests"], options["seed"]
    if options["trace_arrivals"]:
        window = sample_window(rows, min(count, len(rows)), seed)
        return iter(scaled_to_rate(window, rate_rps))
    return stream_requests(rows, count, rate_rps, options["cv"], seed)


def _show(results: dict[str, dict[str, Any]], rate_rps: float, capacity: float) -> None:
    first = next(iter(results.values()))
    table = Table(
        title=f"{first['requests']:,} requests, {rate_rps:.3g} a second, "
        f"{rate_rps / capacity:.2f} of what first come, first served sustains"
    )
    table.add_column("")
    for title, _, _ in COLUMNS:
        table.add_column(title, justify="right")
    for name, figures in results.items():
        cells = ((figures[group] or {}).get(figure) for _, group, figure in COLUMNS)
        table.add_row(name, *("" if cell is None else f"{cell:.4g}" for cell in cells))
    Console().print(table)
