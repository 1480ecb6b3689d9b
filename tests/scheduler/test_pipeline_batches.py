"""Several batches in flight: who is chosen when a place in the pipeline frees."""

import random
from collections import deque

import pytest

from fastserve_vllm.policy.job import JobState

pytestmark = pytest.mark.host_versions

STAGES = {
    "2 stages": {"pipeline_parallel_size": 2},
    "4 stages": {"pipeline_parallel_size": 4},
    # As on GPUs: the V2 model runner, and one batch more than there are stages.
    "2 stages, asynchronous": {"pipeline_parallel_size": 2, "async_scheduling": True},
    "3 stages, asynchronous": {"pipeline_parallel_size": 3, "async_scheduling": True},
}


@pytest.fixture(params=STAGES.values(), ids=STAGES)
def pipeline(request, make_engine):
    """An engine with four places in each batch and memory to spare; and its number of stages."""
    stages = request.param["pipeline_parallel_size"]
    overlap = bool(request.param.get("async_scheduling"))
    arguments = {"max_num_seqs": 64, "max_num_active_seqs": 4, **request.param}
    engine = make_engine(4096, v2=overlap, **arguments)
    assert engine.config.max_concurrent_batches == stages + overlap
    return engine, stages


def watch(engine):
    """Notes for each plan: the first of the order that could run then, and who was chosen."""
    scheduler, planner, noted = engine.scheduler, engine.scheduler.planner, []
    make = planner.plan

    def plan(limits, now_s):
        planner.roster.refresh(planner.policy)
        jobs = sorted(planner.jobs, key=lambda job: job.key)
        waits = {*scheduler.demand.unready(jobs)}
        pending = [j for j in jobs if j not in waits and j.state is not JobState.BLOCKED]
        planned = make(limits, now_s)
        noted.append((pending[: limits.batch_limit], list(planned.batch)))
        return planned

    planner.plan = plan
    return noted


def arrive(engine, rng, number):
    """Now and then a request, or a burst of them; some are urgent."""
    crowded = len(engine.scheduler.requests) > 40
    for _ in range(0 if crowded else rng.choice([0, 0, 0, 1, 1, 7])):
        number += 1
        engine.add(
            f"r{number}", rng.randint(1, 90), rng.randint(1, 40), priority=rng.choice([0, 0, -1])
        )
    return number


def test_the_highest_pending_jobs_are_chosen_and_no_place_is_idle(pipeline):
    """Every batch is the first of the order among those who are in no batch in flight, full where
    as many can run; vLLM schedules just that, and those of the other stages' batches stay out.
    """
    engine, stages = pipeline
    rng, number, full = random.Random(0), 0, 0
    noted, others = watch(engine), deque(maxlen=stages - 1)
    for _ in range(400):
        number = arrive(engine, rng, number)
        scheduled = set(engine.step())
        pending, chosen = noted[-1]
        assert chosen == pending
        assert scheduled == {job.job_id for job in chosen}
        assert scheduled.isdisjoint(set().union(*others))
        others.append(scheduled)
        full += len(scheduled) == 4
        engine.scheduler.check_integrity()
    assert full > 100
    counters = engine.scheduler.planner.counters
    assert counters.started > counters.finished > 30
    engine.drain()


def test_an_arrival_is_in_the_next_batch(make_engine):
    """Both stages are busy with older ones: who arrives is in the next batch that is decided."""
    engine = make_engine(max_num_seqs=1, pipeline_parallel_size=2)
    for name in "ab":
        engine.add(name, 10, 50)
    assert [list(engine.step()) for _ in range(8)] == [["a"], ["b"]] * 4
    engine.add("c", 10, 1)
    assert list(engine.step()) == ["c"]
    assert sorted(list(engine.step()) + list(engine.step())) == ["a", "b"]


def test_a_stage_is_not_left_idle_for_a_better_job_in_flight(make_engine):
    """The urgent one is in the other stage's batch: meanwhile somebody else's step runs."""
    engine = make_engine(max_num_seqs=1, pipeline_parallel_size=2)
    engine.add("urgent", 10, 4, priority=-1)
    engine.add("other", 10, 4)
    assert [list(engine.step()) for _ in range(4)] == [["urgent"], ["other"]] * 2
