from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks.virtual_clock import (
    StepShape,
    VirtualClock,
    VirtualTime,
    alone_seconds,
    current_clock,
    step_shape,
    use_clock,
)


def step(new=(), **tokens):
    """A scheduler output; `new` holds (id, prompt tokens, computed tokens)."""
    started = [
        SimpleNamespace(req_id=name, prompt_token_ids=[7] * prompt, num_computed_tokens=computed)
        for name, prompt, computed in new
    ]
    return SimpleNamespace(scheduled_new_reqs=started, num_scheduled_tokens=tokens)


class Scheduler:
    """Stands in for vLLM's: hands out prepared steps."""

    def __init__(self, steps):
        self.steps = iter(steps)
        self.preempted = []

    def schedule(self):
        return next(self.steps)

    def _preempt_request(self, request):
        self.preempted.append(request)


class Timed(VirtualTime, Scheduler):
    pass


def test_clock_moves_only_forward():
    """It advances, jumps ahead, and refuses to go back."""
    clock = VirtualClock()
    clock.advance(1.5)
    clock.advance_to(4.0)
    clock.advance_to(2.0)
    assert clock() == 4.0
    for seconds in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="cannot advance"):
            clock.advance(seconds)


def test_step_seconds():
    """The documented model: base, prefill tokens, decodes."""
    assert StepShape(0, 0).seconds == pytest.approx(0.0014)
    assert StepShape(100, 10).seconds == pytest.approx(0.0014 + 100 * 21e-6 + 10 * 30e-6)


@pytest.mark.parametrize(
    ("scheduled", "shape"),
    [
        (step(a=1, b=1), StepShape(0, 2)),
        (step(new=[("a", 50, 0)], a=50, b=1), StepShape(50, 1)),
        (step(new=[("a", 1, 0)], a=1), StepShape(1, 0)),
        (step(new=[("a", 33, 32)], a=1), StepShape(1, 0)),
        (step(new=[("a", 33, 40)], a=1), StepShape(0, 1)),
        (step(a=7), StepShape(7, 0)),
        (step(), StepShape(0, 0)),
    ],
    ids=["decodes", "mixed", "one-token-prompt", "cached-prompt", "resumed", "chunk", "empty"],
)
def test_step_shape(scheduled, shape):
    """One token is a decode unless it computes a prompt's first step."""
    assert step_shape(scheduled) == shape


def test_scheduling_takes_its_time():
    """The mixin advances the clock in use by each step's seconds, and counts."""
    clock = VirtualClock()
    use_clock(clock)
    scheduler = Timed([step(new=[("a", 50, 0)], a=50), step(a=1), step()])
    for _ in range(3):
        scheduler.schedule()
    totals = scheduler.benchmark_totals
    assert clock() == pytest.approx(3 * 0.0014 + 50 * 21e-6 + 30e-6)
    assert (totals.steps, totals.empty_steps) == (3, 1)
    assert (totals.prefill_tokens, totals.decodes) == (50, 1)


def test_preemptions_are_counted_and_passed_on():
    """The mixin changes nothing about a preemption."""
    use_clock(VirtualClock())
    scheduler = Timed([])
    scheduler._preempt_request("r")
    assert scheduler.preempted == ["r"]
    assert scheduler.benchmark_totals.preemptions == 1


def test_schedulers_take_the_clock_in_use():
    """The last clock given is the current one."""
    clock = VirtualClock(3.0)
    use_clock(clock)
    assert current_clock() is clock


def test_latency_alone():
    """A prefill step, then one decode step for each further token."""
    assert alone_seconds(100, 3) == pytest.approx(0.0014 + 100 * 21e-6 + 2 * 0.00143)
