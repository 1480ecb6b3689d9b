"""First tokens within their share of the time, and what becomes of who comes beyond it."""

from fake_host import Stage
from hypothesis import given
from hypothesis import strategies as st

from fastserve_vllm.policy.ageing import AbsoluteAgeing, RelativeAgeing
from fastserve_vllm.policy.first_tokens import FirstTokenShare
from fastserve_vllm.policy.mlfq import SkipJoinMlfq
from fastserve_vllm.policy.quantum import QuantumLadder

LAST = 3


@given(
    share=st.sampled_from([0.125, 0.5, 1.0]),
    window=st.integers(1, 32),
    events=st.lists(st.tuples(st.integers(0, 16), st.integers(1, 40)), max_size=60),
)
def test_any_stretch_of_time_holds_its_share(share, window, events):
    """Between any two moments: at most that, and a bucket, or a prompt that is longer than it.

    The bound of a leaky bucket; times are exact.
    """
    bucket, now_s, taken = FirstTokenShare(share), 0.0, []
    for pause, length in events:
        now_s += pause / 8
        if bucket.takes(length / 8, now_s, float(window)):
            taken.append((now_s, length / 8))
    for start, (begin_s, _) in enumerate(taken):
        total_s = 0.0
        for end_s, length_s in taken[start:]:
            total_s += length_s
            most_s = share * (end_s - begin_s) + share * window
            longest_s = max(length for _, length in taken)
            assert total_s <= most_s + max(longest_s, share * window)


def test_short_ones_fit_where_long_ones_do_not():
    """Who has no room takes none."""
    bucket = FirstTokenShare(0.5)
    assert bucket.takes(1.0, 0.0, 4.0)
    assert not bucket.takes(1.5, 0.0, 4.0)
    assert bucket.takes(1.0, 0.0, 4.0)
    assert not bucket.takes(0.25, 0.0, 4.0)
    # Who holds nobody up needs no room. A second drains half a second.
    assert bucket.takes(0.0, 0.0, 4.0)
    assert not bucket.takes(0.75, 1.0, 4.0)
    assert bucket.takes(0.5, 1.0, 4.0)


def test_an_empty_bucket_takes_any():
    """A prompt longer than the bucket is no reason to wait when no other has come of late."""
    bucket = FirstTokenShare(0.5)
    assert bucket.takes(100.0, 0.0, 4.0)
    assert not bucket.takes(0.1, 196.0, 4.0)
    assert bucket.takes(0.1, 197.0, 4.0)


def crowd(ageing, **options) -> Stage:
    """Four prompts at once, each two seconds longer than a step: in a window there are four."""
    policy = SkipJoinMlfq(
        QuantumLadder(1.0, 2.0, LAST + 1), ageing=ageing, service_weight=1.0, **options
    )
    stage = Stage(policy)
    for name in "abcd":
        # The planner knows what the first step takes before the job joins.
        stage.add(name, output=30, first_step_s=3.0)
    return stage


RELATIVE = RelativeAgeing(ratio=0.0, gap_s=8.0, limit_s=8.0, most_turns=1)


def levels(stage: Stage) -> list[int]:
    return [stage.jobs[name].level for name in "abcd"]


def test_beyond_the_share_a_job_joins_the_last_level():
    """Skip-join puts the others where their first step fits."""
    stage = crowd(RELATIVE, first_tokens=FirstTokenShare(0.5))
    assert levels(stage) == [2, 2, LAST, LAST]
    assert stage.planner.policy.skip_joins == 4
    assert levels(crowd(RELATIVE)) == [2, 2, 2, 2]


def test_it_has_its_first_token_in_a_turn():
    """Not before those that are being answered, and not later than ageing lets it."""
    stage = crowd(RELATIVE, first_tokens=FirstTokenShare(0.5))
    order = []
    for _ in range(14):
        order.append(stage.step(batch_limit=1))
        stage.spend(1.0)
    first = {name: order.index(name) for name in "abcd"}
    assert first["a"] < first["b"] < first["c"] < first["d"]
    assert first["c"] == 8


def test_without_turns_nobody_is_put_off():
    """The absolute rule promotes to the highest level; nothing bounds the gap."""
    share = FirstTokenShare(0.5)
    assert levels(crowd(AbsoluteAgeing(8.0), first_tokens=share)) == [2, 2, 2, 2]
    assert levels(crowd(None, first_tokens=share)) == [2, 2, 2, 2]


def test_without_skip_join_nobody_is_put_off():
    """The naive queues begin with the highest one."""
    stage = crowd(RELATIVE, first_tokens=FirstTokenShare(0.5), skip_join=False)
    assert levels(stage) == [0, 0, 0, 0]
