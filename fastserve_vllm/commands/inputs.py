"""What `simulate` and `plan` are told in the same way: requests, an engine, policies."""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from fastserve_vllm.config import POLICY_NAMES, ConfigError, FastServeConfig
from fastserve_vllm.policy.step_time import StepTimeModel, load_profile
from fastserve_vllm.simulator.run import virtual_step_time
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
F = TypeVar("F", bound=Callable[..., Any])


def positive(_ctx: click.Context, _param: click.Parameter, value: float | None) -> float | None:
    """A click callback: finite and above 0."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise click.BadParameter(f"must be a finite number above 0, got {value}")
    return value


def configuration(text: str, common: dict[str, Any]) -> FastServeConfig:
    """A policy, one of the user's own (`module:Class`), an objective, or JSON.

    Raises:
        ClickException: it is none of them, or not valid.
    """
    own: dict[str, Any]
    if text in POLICY_NAMES:
        own = {"policy": text}
    elif text in OBJECTIVES:
        own = {"objective": text}
    elif re.fullmatch(r"[\w.]+:\w+", text):
        own = {"policy": text}
    else:
        own = json_object(text)
    if own.get("policy") == "fcfs":
        # Nobody is preempted, so nothing is swapped: this is stock vLLM.
        own.setdefault("swap_mode", "recompute")
    try:
        return FastServeConfig.parse({**common, **own})
    except ConfigError as error:
        raise click.ClickException(str(error)) from None


def json_object(text: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ClickException: it is something else.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        names = ", ".join((*POLICY_NAMES, *OBJECTIVES))
        raise click.ClickException(
            f"{text!r} is neither one of {names} nor module:Class nor a JSON object"
        )
    return value


def _options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def trace_options() -> Callable[[F], F]:
    """Options that say which requests there are."""
    return _options(
        click.option("--workload", type=click.Choice(sorted(WORKLOADS)), help="Built-in lengths."),
        click.option(
            "--trace",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="CSV of prompt and output lengths, as for the benchmarks.",
        ),
        click.option("--trace-arrivals", is_flag=True, help="The trace's own arrivals, scaled."),
    )


def arrival_options() -> Callable[[F], F]:
    """Options that say how often requests arrive, and how many."""
    return _options(
        click.option("--load", type=float, callback=positive, help="Arrival rate over capacity."),
        click.option("--rate", type=float, callback=positive, help="Arrivals a second, instead."),
        click.option(
            "--cv", type=float, default=1.0, callback=positive, help="Burstiness; 1 is Poisson."
        ),
        click.option("--requests", type=click.IntRange(1), default=2000, show_default=True),
        click.option("--seed", type=int, default=0, show_default=True),
    )


def engine_options() -> Callable[[F], F]:
    """Options that say how large the engine is, and how fast."""
    return _options(
        click.option("--batch", type=click.IntRange(1), default=16, show_default=True),
        click.option("--token-budget", type=click.IntRange(1), default=2048, show_default=True),
        click.option("--block-tokens", type=click.IntRange(1), default=32, show_default=True),
        click.option("--device-blocks", type=click.IntRange(1), default=1 << 20, help="KV blocks."),
        click.option("--host-blocks", type=click.IntRange(0), default=1 << 20, help="KV blocks."),
        click.option(
            "--copy-ratio",
            type=click.FloatRange(0),
            default=0.1,
            show_default=True,
            help="Seconds of copying a token's KV over those of prefilling it.",
        ),
        click.option(
            "--step-time-profile",
            type=click.Path(exists=True, dir_okay=False),
            help="What steps take: a profile saved by --fastserve-config.save_step_time_profile. "
            "Without, the benchmarks' virtual clock.",
        ),
        click.option(
            "--config", default="{}", help="Further FastServe configuration for all, JSON."
        ),
    )


def check_exclusive(options: dict[str, Any]) -> None:
    """One source of lengths, and at most one of the two ways to say how often requests arrive.

    Raises:
        UsageError: naming the options.
    """
    if (options["workload"] is None) == (options["trace"] is None):
        raise click.UsageError("give one of --workload and --trace")
    if options["load"] is not None and options["rate"] is not None:
        raise click.UsageError("give one of --load and --rate")


def rows(options: dict[str, Any]) -> list[TraceRow]:
    """The lengths to draw from.

    Raises:
        InputError: the trace cannot be used.
    """
    if options["workload"] is not None:
        return built_in(options["workload"])
    kept = paper_filter(load_trace(options["trace"]))
    if not kept:
        raise InputError(f"{options['trace']} holds no request that the paper's filter keeps")
    return kept


def shape(options: dict[str, Any]) -> EngineShape:
    """The engine."""
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


def requests(
    lengths: list[TraceRow], rate_rps: float, options: dict[str, Any]
) -> Iterator[Request]:
    """The requests, one by one: the same ones each time."""
    count, seed = options["requests"], options["seed"]
    if options["trace_arrivals"]:
        window = sample_window(lengths, min(count, len(lengths)), seed)
        return iter(scaled_to_rate(window, rate_rps))
    return stream_requests(lengths, count, rate_rps, options["cv"], seed)
