"""The real scheduler under random events; `make fuzz STEPS=...` goes on for as long as wanted."""

from scheduler_fuzz import fuzz, write_profile

STEPS = 10_000


def test_random_events_break_no_law(tiny_model, tmp_path):
    """I1-I4, I6 and I9 after each of 10,000 steps: arrivals, aborts, resets, pauses, late and
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
