"""Whole simulations: an engine, a configuration and requests in, figures out."""

import math
from collections.abc import Iterable
from typing import Any

from fastserve_vllm.config import FastServeConfig
from fastserve_vllm.policy.base import Policy
from fastserve_vllm.policy.step_time import StepTimeModel
from fastserve_vllm.simulator.engine import SimulatedEngine
from fastserve_vllm.simulator.figures import Figures
from fastserve_vllm.simulator.fleet import Fleet
from fastserve_vllm.simulator.shape import EngineShape
from fastserve_vllm.simulator.targets import Scorecard
from fastserve_vllm.traces import Request, TraceRow, all_present, sample_requests

# Steps of the benchmarks' virtual clock: a tiny model on one CPU core. Seconds per step, prefill
# token, decode and context token.
VIRTUAL_STEP = (0.0014, 21e-6, 30e-6, 0.0)
_CAPACITY_REQUESTS = 400
_VERDICT_EVERY = 100


def virtual_step_time() -> StepTimeModel:
    """What steps take on the benchmarks' virtual clock."""
    return StepTimeModel(VIRTUAL_STEP, pinned=True)


def simulate(
    shape: EngineShape,
    config: FastServeConfig,
    requests: Iterable[Request],
    *,
    policy: Policy | None = None,
    long_prompt_tokens: float = math.inf,
) -> dict[str, Any]:
    """Serve the requests, and return the figures of the run.

    Args:
        shape: the engine.
        config: FastServe's configuration.
        requests: in order of arrival; read one by one.
        policy: a policy of the caller's own.
        long_prompt_tokens: prompts of at least so many tokens have figures of their own, too.

    Raises:
        ValueError: there are no requests, or one can never fit.
    """
    figures = Figures(long_prompt_tokens)
    engine = SimulatedEngine(shape, config, policy=policy, on_gap=figures.gap)
    for served in engine.serve(requests):
        figures.take(served)
    return {**figures.document(), **_costs(engine)}


def simulate_fleet(
    fleet: Fleet,
    requests: Iterable[Request],
    scorecard: Scorecard | None = None,
    *,
    to_the_end: bool = True,
) -> dict[str, Any] | None:
    """Serve the requests by several replicas, and return the figures of the run.

    Args:
        fleet: a new one.
        requests: in order of arrival; read one by one.
        scorecard: takes in what is served.
        to_the_end: otherwise the run ends as soon as a target is missed for certain.

    Returns:
        The figures, without those of single gaps; None: the run ended early.

    Raises:
        ValueError: there are no requests, or one can never fit.
    """
    figures = Figures()
    for number, served in enumerate(fleet.serve(requests)):
        figures.take(served)
        if scorecard is not None:
            scorecard.take(served)
            if not to_the_end and number % _VERDICT_EVERY == 0 and scorecard.missed:
                return None
    document = figures.document()
    del document["itl_ms"], document["long_prompts_ttft_ms"]
    return {**document, **_shares(fleet, document["duration_s"])}


def _shares(fleet: Fleet, duration_s: float) -> dict[str, Any]:
    """How the work was spread over the replicas."""
    got = [replica.got for replica in fleet.replicas]
    busy = [replica.engine.stepping_s / duration_s for replica in fleet.replicas]
    engines = [replica.engine for replica in fleet.replicas]
    return {
        "replicas": len(fleet.replicas),
        "requests_of_a_replica": {"min": min(got), "max": max(got)},
        "busy_share": {"mean": sum(busy) / len(busy), "min": min(busy), "max": max(busy)},
        "steps": sum(engine.steps for engine in engines),
        "prefill_tokens": sum(engine.prefill_tokens for engine in engines),
    }


def capacity_rps(
    shape: EngineShape, rows: list[TraceRow], seed: int, requests: int = _CAPACITY_REQUESTS
) -> float:
    """Requests a second of first come, first served, with all requests present at the start.

    The more requests, the less it counts that the last ones do not fill the batch.
    """
    count = min(requests, len(rows))
    present = all_present(sample_requests(rows, count, seed))
    config = FastServeConfig(policy="fcfs", swap_mode="recompute")
    return float(simulate(shape, config, present)["requests_per_s"])


def _costs(engine: SimulatedEngine) -> dict[str, Any]:
    counters, copied = engine.planner.counters, engine.kv.counters
    return {
        "steps": engine.steps,
        "step_ms": {"mean": 1000 * engine.stepping_s / engine.steps},
        "prefill_tokens": engine.prefill_tokens,
        "preemptions": {"paused": counters.paused, "recomputed": counters.recomputed},
        "swaps": {
            "outs_ahead": counters.swapped_out,
            "outs_urgent": counters.spilled,
            "ins_ahead": counters.swapped_in,
            "blocks_out": copied.out,
            "blocks_in": copied.into,
            "first_out_copied": _share(copied.first_out_copied, copied.first_out),
            "again_out_copied": _share(copied.later_out_copied, copied.later_out),
            "copy_wait_share": engine.copy_wait_s / engine.stepping_s,
        },
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
