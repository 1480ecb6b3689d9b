"""Watches a live scheduler: counts its steps, times it, and lets virtual time pass.

vLLM and FastServe are measured as they are installed: the methods of the one scheduler object are
wrapped, no class is replaced.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from benchmarks.virtual_clock import StepShape, step_shape


@dataclass(slots=True)
class StepTotals:
    """Counters over the steps of a run."""

    steps: int = 0
    empty_steps: int = 0
    prefill_tokens: int = 0
    decodes: int = 0
    vllm_preemptions: int = 0
    # Wall time inside the scheduler, whatever clock the run is on.
    scheduler_wall_s: float = 0.0

    def add(self, shape: StepShape) -> None:
        """Count one step."""
        self.steps += 1
        self.empty_steps += shape == StepShape(0, 0)
        self.prefill_tokens += shape.prefill_tokens
        self.decodes += shape.decodes


class StepTime(Protocol):
    """How time passes with an engine's steps."""

    def scheduled(self, step: Any, shape: StepShape) -> None:
        """A step was decided and is about to compute."""
        ...

    def finished(self, output: Any) -> Any:
        """A step's output goes to the scheduler: returns it as the scheduler is to see it."""
        ...


class WallTime:
    """Time passes by itself."""

    def scheduled(self, step: Any, shape: StepShape) -> None:
        """Nothing to do."""

    def finished(self, output: Any) -> Any:
        """The output as it is."""
        return output


class StepMeter:
    """Wraps a scheduler object's methods for as long as the object lives."""

    def __init__(self, scheduler: Any, step_time: StepTime) -> None:
        self.totals = StepTotals()
        # Prefill tokens, decodes and tokens of context of every step.
        self.shapes: list[tuple[int, int, int]] = []
        self._scheduler = scheduler
        self._time = step_time
        self._schedule = scheduler.schedule
        self._update_from_output = scheduler.update_from_output
        self._preempt_request = scheduler._preempt_request
        scheduler.schedule = self._on_schedule
        scheduler.update_from_output = self._on_output
        scheduler._preempt_request = self._on_preemption

    def counters(self) -> dict[str, Any]:
        """Running totals of the steps and of what FastServe counts itself."""
        return {**asdict(self.totals), **fastserve_counters(self._scheduler)}

    def _on_schedule(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        step = self._schedule(*args, **kwargs)
        self.totals.scheduler_wall_s += time.perf_counter() - started
        shape = step_shape(step)
        self.totals.add(shape)
        context = sum(step.scheduled_cached_reqs.num_computed_tokens)
        self.shapes.append((shape.prefill_tokens, shape.decodes, context))
        self._time.scheduled(step, shape)
        return step

    def _on_output(self, step: Any, output: Any) -> Any:
        output = self._time.finished(output)
        started = time.perf_counter()
        outputs = self._update_from_output(step, output)
        self.totals.scheduler_wall_s += time.perf_counter() - started
        return outputs

    def _on_preemption(self, *args: Any, **kwargs: Any) -> Any:
        self.totals.vllm_preemptions += 1
        return self._preempt_request(*args, **kwargs)


def fastserve_counters(scheduler: Any) -> dict[str, Any]:
    """What FastServe's planner, policy and swap counted; nothing for stock vLLM."""
    planner = getattr(scheduler, "planner", None)
    if planner is None:
        return {}
    counters = asdict(planner.counters)
    for name in ("demotions", "promotions", "skip_joins"):
        if hasattr(planner.policy, name):
            counters[name] = getattr(planner.policy, name)
    exchange = getattr(scheduler, "exchange", None)
    if exchange is not None:
        counters["swap"] = {
            **asdict(exchange.manager.counters),
            "bytes": dict(exchange.copied_bytes),
            "waited_s": exchange.waited_s,
        }
    return counters


def increase(after: Any, before: Any) -> Any:
    """Counters of the time between two readings, key by key."""
    if isinstance(after, dict):
        return {key: increase(value, (before or {}).get(key)) for key, value in after.items()}
    return after - (before or 0)
