from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace

import pytest

from benchmarks import alone
from benchmarks.meter import StepMeter, increase
from benchmarks.records import RequestRecord
from benchmarks.virtual_clock import StepShape, VirtualClock, step_shape
from benchmarks.virtual_copies import VirtualCopies
from benchmarks.virtual_time import VirtualTime


def step(new=(), **tokens):
    """A scheduler output; `new` holds (id, prompt tokens, computed tokens)."""
    started = [
        SimpleNamespace(req_id=name, prompt_token_ids=[7] * prompt, num_computed_tokens=computed)
        for name, prompt, computed in new
    ]
    return SimpleNamespace(
        scheduled_new_reqs=started,
        scheduled_cached_reqs=SimpleNamespace(num_computed_tokens=[]),
        num_scheduled_tokens=tokens,
    )


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


class Scheduler:
    """Stands in for vLLM's: hands out prepared steps."""

    def __init__(self, steps=()):
        self.steps = iter(steps)
        self.preempted = []
        self.outputs = []

    def schedule(self):
        return next(self.steps)

    def update_from_output(self, step, output):
        self.outputs.append(output)
        return "outputs"

    def _preempt_request(self, request):
        self.preempted.append(request)


def metered(steps):
    clock = VirtualClock()
    scheduler = Scheduler(steps)
    time = VirtualTime(clock, VirtualCopies(0.001), carry=None)
    return scheduler, StepMeter(scheduler, time), clock


def test_scheduling_takes_its_time():
    """A metered scheduler advances the clock by each step's seconds, and its steps are counted."""
    scheduler, meter, clock = metered([step(new=[("a", 50, 0)], a=50), step(a=1), step()])
    for _ in range(3):
        scheduler.schedule()
    totals = meter.totals
    assert clock() == pytest.approx(3 * 0.0014 + 50 * 21e-6 + 30e-6)
    assert (totals.steps, totals.empty_steps) == (3, 1)
    assert (totals.prefill_tokens, totals.decodes) == (50, 1)


def test_the_meter_changes_nothing():
    """Preemptions and outputs are passed on as they are; preemptions are counted."""
    scheduler, meter, _ = metered([])
    scheduler._preempt_request("r")
    output = SimpleNamespace(kv_connector_output=None)
    assert scheduler.update_from_output("step", output) == "outputs"
    assert (scheduler.preempted, scheduler.outputs) == (["r"], [output])
    assert meter.counters()["vllm_preemptions"] == 1


def test_counters_of_the_measured_part():
    """What happened before it, in the warm-up, does not count."""
    before = {"steps": 3, "declined": {"slots": 2}}
    after = {"steps": 10, "declined": {"slots": 2, "tokens": 4}}
    assert increase(after, before) == {"steps": 7, "declined": {"slots": 0, "tokens": 4}}


def test_latency_alone():
    """A prefill step, then one decode step for each further token."""
    assert alone.VIRTUAL(100, 3) == pytest.approx(0.0014 + 100 * 21e-6 + 2 * 0.00143)


def test_latency_alone_is_measured_by_prompt_length():
    """The first step and a prompt token's share come from short and long prompts."""
    model = alone.Alone(first_s=0.002, prompt_token_s=1e-5, token_s=0.003)
    records = [
        RequestRecord(r.id, 0.0, r.prompt_tokens, r.output_tokens, _times(model, r), "")
        for r in alone.alone_requests()
    ]
    found = alone.measured(records)
    assert asdict(found) == pytest.approx(asdict(model))
    assert asdict(alone.Alone.parse(found.document())) == pytest.approx(asdict(model))


def _times(model, request):
    return [model(request.prompt_tokens, n) for n in range(1, request.output_tokens + 1)]
