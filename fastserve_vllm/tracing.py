"""The planner of a live engine: one that tells what it does where somebody wants to know."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.config import ParallelConfig

from fastserve_vllm.config import ConfigError
from fastserve_vllm.policy.base import Policy
from fastserve_vllm.policy.job import Job
from fastserve_vllm.policy.plan import StepPlanner
from fastserve_vllm.spans import SpanSink
from fastserve_vllm.trace.recorder import RecordedPlanner, Sink
from fastserve_vllm.trace.trace_file import TraceFile

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from fastserve_vllm.scheduler import FastServeScheduler


def make_planner(
    scheduler: "FastServeScheduler", policy: Policy, device_blocks: int | None
) -> StepPlanner:
    """The scheduler's planner.

    Raises:
        ConfigError: the trace file cannot be written.
    """
    demand, exchange = scheduler.demand, scheduler.exchange
    sinks = list(_sinks(scheduler))
    if not sinks:
        return StepPlanner(policy, demand, exchange, device_blocks)
    tables = scheduler.kv_cache_manager

    def blocks(job: Job) -> int:
        return sum(len(group) for group in tables.get_block_ids(job.job_id))

    return RecordedPlanner(
        policy,
        demand,
        exchange,
        device_blocks,
        sinks=sinks,
        blocks=blocks,
        outcome=_outcome,
        clock=scheduler.clock,
    )


def close_trace(planner: StepPlanner) -> None:
    """Write what is pending."""
    if isinstance(planner, RecordedPlanner):
        for sink in planner.sinks:
            sink.close()


def _sinks(scheduler: "FastServeScheduler") -> Iterator[Sink]:
    config, vllm_config = scheduler.fastserve_config, scheduler.vllm_config
    if config.trace_file is not None:
        about: dict[str, Any] = {
            "policy": config.policy,
            "batch_limit": scheduler.max_num_active_reqs,
            "device_blocks": scheduler.kv_cache_config.num_blocks,
            "block_tokens": scheduler.block_size,
            "swap_mode": config.swap_mode,
        }
        path = _own_path(config.trace_file, vllm_config.parallel_config)
        try:
            yield TraceFile(path, about)
        except OSError as error:
            raise ConfigError(f"fastserve_config.trace_file: {error}") from None
    if vllm_config.observability_config.otlp_traces_endpoint is not None:
        from opentelemetry import trace

        yield SpanSink(trace.get_tracer("fastserve_vllm"), scheduler.clock)


def _outcome(job: Job) -> str:
    request: Request = job.handle
    return str(request.status).removeprefix("RequestStatus.").lower()


def _own_path(path: str, parallel: ParallelConfig) -> str:
    """Engines of one server do not write into each other's file.

    vLLM tells those of a dense model their number, but not that there are others.
    """
    if parallel.data_parallel_index == 0:
        return path
    named = Path(path)
    return str(named.with_name(f"{named.stem}.engine{parallel.data_parallel_index}{named.suffix}"))
