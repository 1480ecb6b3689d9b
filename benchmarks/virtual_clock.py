"""Virtual time: the engine really steps, but a fixed model says how long each step took.

Scheduling figures are then free of noise and the same on every machine. This module imports
neither vLLM nor FastServe; `virtual_schedulers` and `virtual_fastserve` apply it to them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

# Seconds of a step of a tiny model on one CPU core: per step, per prefill token, per decode.
STEP_BASE_SECONDS = 0.0014
PREFILL_TOKEN_SECONDS = 21e-6
DECODE_SECONDS = 30e-6


class VirtualClock:
    """A clock that moves only when told to. Calling it reads the time in seconds."""

    def __init__(self, now_s: float = 0.0) -> None:
        self._now_s = now_s

    def __call__(self) -> float:
        """Read the time."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move forward. Raises ValueError for a negative step."""
        if not seconds >= 0:
            raise ValueError(f"a clock cannot advance by {seconds} s")
        self._now_s += seconds

    def advance_to(self, moment_s: float) -> None:
        """Move forward to a moment; a moment in the past changes nothing."""
        self._now_s = max(self._now_s, moment_s)


class _ClockInUse:
    """The process-wide clock: vLLM constructs schedulers itself, so no argument can carry it."""

    clock: VirtualClock | None = None


def use_clock(clock: VirtualClock) -> None:
    """Make `clock` the one that schedulers built from now on take."""
    _ClockInUse.clock = clock


def current_clock() -> VirtualClock:
    """Return the clock in use. Raises RuntimeError before `use_clock`."""
    if _ClockInUse.clock is None:
        raise RuntimeError("no virtual clock: call use_clock() before the engine is built")
    return _ClockInUse.clock


class NewRequestView(Protocol):
    """What is read of vLLM's `NewRequestData`."""

    req_id: str
    prompt_token_ids: Sequence[int] | None
    num_computed_tokens: int


class StepView(Protocol):
    """What is read of vLLM's `SchedulerOutput`."""

    scheduled_new_reqs: Sequence[NewRequestView]
    num_scheduled_tokens: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class StepShape:
    """The work in one engine step."""

    prefill_tokens: int
    decodes: int

    @property
    def seconds(self) -> float:
        """Duration of the step; a step without work still costs its base."""
        prefill_s = PREFILL_TOKEN_SECONDS * self.prefill_tokens
        return STEP_BASE_SECONDS + prefill_s + DECODE_SECONDS * self.decodes


def step_shape(step: StepView) -> StepShape:
    """Split a step into prefill tokens and decodes.

    A request with exactly one scheduled token decodes, unless it still computes its prompt in
    its first step: a prompt of one token, or one whose other tokens came from a cache.
    """
    starting = {new.req_id for new in step.scheduled_new_reqs if _computes_prompt(new)}
    prefill_tokens = decodes = 0
    for request_id, tokens in step.num_scheduled_tokens.items():
        if tokens == 1 and request_id not in starting:
            decodes += 1
        else:
            prefill_tokens += tokens
    return StepShape(prefill_tokens, decodes)


def _computes_prompt(new: NewRequestView) -> bool:
    return new.num_computed_tokens < len(new.prompt_token_ids or ())


def alone_seconds(prompt_tokens: int, output_tokens: int) -> float:
    """End-to-end latency of a request that has the engine to itself: prefill, then decodes."""
    decode_s = StepShape(prefill_tokens=0, decodes=1).seconds
    return StepShape(prompt_tokens, decodes=0).seconds + (output_tokens - 1) * decode_s


@dataclass(slots=True)
class StepTotals:
    """Counters over the steps of a run."""

    steps: int = 0
    empty_steps: int = 0
    prefill_tokens: int = 0
    decodes: int = 0
    preemptions: int = 0
    # Wall time inside the scheduler, the only figure here that differs between machines.
    scheduler_wall_s: float = 0.0

    def add(self, shape: StepShape) -> None:
        """Count one step."""
        self.steps += 1
        self.empty_steps += shape == StepShape(0, 0)
        self.prefill_tokens += shape.prefill_tokens
        self.decodes += shape.decodes


class VirtualTime:
    """Mixin for a vLLM scheduler class: each `schedule()` advances the current virtual clock.

    The clock moves when a step has been decided, so its tokens carry the time of its end, and
    the next decision reads it too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.benchmark_clock = current_clock()
        self.benchmark_totals = StepTotals()
        super().__init__(*args, **kwargs)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Decide a step, then let it take its time."""
        started = time.perf_counter()
        step = super().schedule(*args, **kwargs)  # type: ignore[misc]
        self.benchmark_totals.scheduler_wall_s += time.perf_counter() - started
        shape = step_shape(step)
        self.benchmark_totals.add(shape)
        self.benchmark_clock.advance(shape.seconds)
        return step

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        """Take in a step's output; timed because it is scheduler time too."""
        started = time.perf_counter()
        outputs = super().update_from_output(*args, **kwargs)  # type: ignore[misc]
        self.benchmark_totals.scheduler_wall_s += time.perf_counter() - started
        return outputs

    def benchmark_counters(self) -> dict[str, Any]:
        """Counters of the system's own, beside `benchmark_totals`; a scheduler may override it."""
        return {}

    def _preempt_request(self, *args: Any, **kwargs: Any) -> Any:
        self.benchmark_totals.preemptions += 1
        return super()._preempt_request(*args, **kwargs)  # type: ignore[misc]
