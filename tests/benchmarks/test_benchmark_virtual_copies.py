from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks.virtual_clock import VirtualClock
from benchmarks.virtual_copies import VirtualCopies, block_seconds
from benchmarks.virtual_time import VirtualTime
from fastserve_vllm.kv_swap.transfers import Direction, Report, Transfer

OUT, IN = Direction.OUT, Direction.IN
# A block takes a second.
BLOCK_S = 1.0


def transfer(number, blocks, direction=OUT, urgent=False):
    return Transfer(number, direction, tuple(range(blocks)), tuple(range(blocks)), urgent)


def done(*numbers, **figures):
    return Report(done=dict.fromkeys(numbers, 1), **figures)


def test_a_direction_is_a_queue():
    """The second copy out waits for the first; a copy in does not."""
    copies = VirtualCopies(BLOCK_S)
    moved = [transfer(1, 2), transfer(2, 3), transfer(3, 1, IN)]
    assert copies.begin(moved, 10.0) == 0.0
    copies.hold(done(1, 2, 3))
    assert set(copies.take_report(11.0).done) == {3}
    assert copies.take_report(11.9) is None
    assert set(copies.take_report(12.0).done) == {1}
    assert copies.next_end_s() == 15.0
    assert set(copies.take_report(15.0).done) == {2}
    assert copies.next_end_s() is None


def test_a_report_is_in_virtual_seconds():
    """Bytes are the worker's; seconds and waiting are not."""
    copies = VirtualCopies(BLOCK_S)
    copies.begin([transfer(1, 3)], 0.0)
    copies.hold(done(1, copied_bytes={"out": 300}, copy_s={"out": 99.0}, waited_s=77.0))
    report = copies.take_report(3.0)
    assert (report.copied_bytes, report.copy_s, report.waited_s) == ({"out": 300}, {"out": 3.0}, 0)


def test_urgent_copies_hold_the_step_up():
    """The step stands still until they have ended, behind what is in their channel already."""
    copies = VirtualCopies(BLOCK_S)
    copies.begin([transfer(1, 2)], 0.0)
    assert copies.begin([transfer(2, 1, urgent=True)], 1.0) == 2.0
    copies.hold(done(1, 2))
    assert copies.take_report(3.0).waited_s == 2.0


def test_a_flush_waits_for_what_is_in_flight():
    """Everything begun before ends before the step computes."""
    copies = VirtualCopies(BLOCK_S)
    copies.begin([transfer(1, 4), transfer(2, 1, IN)], 0.0)
    assert copies.begin([], 1.0, flush=True) == 3.0


def test_failures_are_passed_on_when_the_copy_would_have_ended():
    """A failed copy moved no bytes."""
    copies = VirtualCopies(BLOCK_S)
    copies.begin([transfer(1, 2), transfer(2, 2)], 0.0)
    copies.hold(done(1, 2, failed={1: "broken"}, copied_bytes={"out": 64}))
    report = copies.take_report(4.0)
    assert (report.failed, report.copied_bytes) == ({1: "broken"}, {"out": 64})


def test_a_copy_that_no_worker_reported_is_not_over():
    """Virtual time alone finishes nothing."""
    copies = VirtualCopies(BLOCK_S)
    copies.begin([transfer(1, 1)], 0.0)
    assert copies.take_report(5.0) is None


def test_seconds_of_a_block():
    """The ratio is to prefilling its tokens at 21 us each."""
    assert block_seconds(32, 0.1) == pytest.approx(32 * 2.1e-6)


def step(*transfers, flush=False, **tokens):
    metadata = SimpleNamespace(transfers=transfers, flush=flush)
    return SimpleNamespace(
        scheduled_new_reqs=(), num_scheduled_tokens=tokens, kv_connector_metadata=metadata
    )


def output(report=None):
    """A model runner's output with a worker's report."""
    meta = None if report is None else SimpleNamespace(report=report)
    connector_output = SimpleNamespace(kv_connector_worker_meta=meta)
    return SimpleNamespace(kv_connector_output=connector_output)


@pytest.fixture
def virtual():
    clock = VirtualClock()
    return VirtualTime(clock, VirtualCopies(0.001), lambda _, report: output(report)), clock


def run(time, scheduled):
    from benchmarks.virtual_clock import step_shape

    time.scheduled(scheduled, step_shape(scheduled))


def test_an_urgent_copy_lengthens_its_step(virtual):
    """Three blocks of a millisecond, then a decode step."""
    time, clock = virtual
    run(time, step(transfer(1, 3, urgent=True), a=1))
    assert clock() == pytest.approx(0.003 + 0.00143)


def test_an_idle_engine_waits_for_the_next_copy(virtual):
    """Empty steps last until a copy ends, and no longer than a look around takes."""
    time, clock = virtual
    run(time, step(transfer(1, 1)))
    assert clock() == pytest.approx(0.001)
    run(time, step(transfer(2, 2)))
    # The first copy was not taken in yet, so the engine looks again at once.
    assert clock() == pytest.approx(0.001)


def test_reports_reach_the_scheduler_when_copies_end(virtual):
    """The worker reports at once; the scheduler hears of it once time has passed."""
    time, _ = virtual
    run(time, step(transfer(1, 2), a=1))
    held = time.finished(output(done(1, copied_bytes={"out": 8})))
    assert held.kv_connector_output.kv_connector_worker_meta is None
    run(time, step(a=1))
    nothing = SimpleNamespace(kv_connector_output=None)
    told = time.finished(nothing)
    assert told.kv_connector_output.kv_connector_worker_meta.report.done == {1: 1}
    assert nothing.kv_connector_output is None
