"""The real scheduler under random events; `make fuzz STEPS=...` goes on for as long as wanted."""

from scheduler_fuzz import FailingWorld, fuzz, write_profile

STEPS = 10_000
FAILING_STEPS = 10_000


def test_random_events_break_no_law(tiny_model, tmp_path):
    """I1-I6, I9 and I10 after each of 10,000 steps: arrivals, aborts, resets, pauses, late and
    failed copies, clock jumps, one to three steps in flight; then everybody finishes."""
    done = fuzz(tiny_model, write_profile(tmp_path), STEPS)
    assert done["plans"] >= STEPS
    seldom = [
        name
        for name in (
            "paused",
            "recomputed",
            "spilled",
            "swapped_out",
            "swapped_in",
            "saved",
            "aborted",
            "copies failed",
            "depth 1",
            "depth 2",
            "depth 3",
            "calm",
        )
        if done[name] < 3
    ]
    assert not seldom, f"hardly happened: {seldom} of {done}"


def test_what_failed_copies_spoil_reaches_nobody(tiny_model, tmp_path):
    """I5 and I10 where a third of the copies fail: some requests compute on what never arrived,
    and no token that comes of it is delivered, nor is any of it found by others."""
    done = fuzz(tiny_model, write_profile(tmp_path), FAILING_STEPS, kind=FailingWorld)
    assert done["copies failed"] > 100
    assert done["misled"] > 10, "nobody computed on what never arrived: this shows nothing"
