"""The queue of jobs that could take a batch place."""

import pytest
from fake_host import make_job, names
from hypothesis import given
from hypothesis import strategies as st

from fastserve_vllm.policy.queues import ReadyQueue, withdraw


def job(name: str, *key: float):
    made = make_job(name)
    made.key = key
    return made


def drain(queue: ReadyQueue) -> str:
    return names([queue.pop() for _ in range(len(queue))])


def test_jobs_come_out_in_the_order_of_their_keys():
    """The first job is the one with the smallest key."""
    queue = ReadyQueue()
    for each in (job("b", 2), job("a", 1), job("c", 3)):
        queue.push(each)
    assert queue.first().job_id == "a"
    assert drain(queue) == "a b c"
    assert queue.first() is None


def test_a_job_moves_when_it_is_pushed_with_a_new_key():
    """Pushing again moves a job; it is there once."""
    queue, moving = ReadyQueue(), job("a", 1)
    queue.push(moving)
    queue.push(job("b", 2))
    moving.key = (3,)
    queue.push(moving)
    assert len(queue) == 2
    assert sorted(each.job_id for each in queue) == ["a", "b"]
    assert drain(queue) == "b a"


def test_a_discarded_job_does_not_come_out():
    """Discarding works wherever the job stands, and twice."""
    queue, gone = ReadyQueue(), job("a", 1)
    queue.push(gone)
    queue.push(job("b", 2))
    queue.discard(gone)
    queue.discard(gone)
    assert len(queue) == 1
    assert drain(queue) == "b"


def test_a_queue_does_not_discard_what_another_holds():
    """A job's ticket says which queue it is in; `withdraw` finds it."""
    here, there, only = ReadyQueue(), ReadyQueue(), job("a", 1)
    there.push(only)
    here.discard(only)
    assert (len(here), len(there)) == (0, 1)
    withdraw(only)
    withdraw(only)
    assert len(there) == 0


def test_an_empty_queue_has_nothing_to_pop():
    """Popping nothing is an error."""
    with pytest.raises(IndexError):
        ReadyQueue().pop()


def test_stale_entries_do_not_pile_up():
    """Jobs that move all the time leave at most about one stale entry a job behind."""
    queue = ReadyQueue()
    jobs = [job(str(i), i, i) for i in range(50)]
    for round_ in range(200):
        for each in jobs:
            each.key = (each.key[0] + round_ % 3 - 1, each.key[1])
            queue.push(each)
    assert len(queue) == 50
    assert len(queue._heap) <= 64 + 2 * 50 + 1
    assert sorted(jobs, key=lambda each: each.key)[0].key == queue.first().key


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(0, 99))))
def test_the_queue_agrees_with_a_sorted_list(operations):
    """Whatever is pushed, moved, discarded and popped, the order is that of the keys."""
    queue, jobs, inside = ReadyQueue(), [job(str(i), i, i) for i in range(10)], set()
    for number, action, key in operations:
        each = jobs[number]
        if action == 0:
            queue.discard(each)
            inside.discard(each)
        elif action == 1 and inside:
            first = min(inside, key=lambda other: other.key)
            assert queue.pop() is first
            inside.remove(first)
        else:
            each.key = (key, number)
            queue.push(each)
            inside.add(each)
        assert len(queue) == len(inside)
        assert set(queue) == inside
        assert queue.first() is min(inside, key=lambda other: other.key, default=None)
