"""KV swap, step by step, on vLLM's own scheduler objects. Blocks hold 32 tokens."""

import random

import pytest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

from fastserve_vllm.kv_swap.transfers import Direction
from fastserve_vllm.policy.job import JobState

pytestmark = pytest.mark.host_versions

MODES = ("proactive", "reactive", "recompute")


def free_blocks(engine):
    return engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def state(engine, request_id):
    return engine.scheduler._jobs[request_id].state


def run(engine, steps=1):
    table = []
    for _ in range(steps):
        table.append(engine.step())
        engine.scheduler.check_integrity()
    return table


def until(engine, request_id, wanted, steps=400):
    """Step until the request is in that state."""
    for _ in range(steps):
        if state(engine, request_id) is wanted:
            return
        run(engine)
    raise AssertionError(f"{request_id} is {state(engine, request_id)}, not {wanted}")


def crowd(engine, count=4, prompt=60, output=200):
    """More requests than the device holds."""
    return [engine.add(f"r{i}", prompt, output) for i in range(count)]


def drained(engine):
    engine.drain()
    engine.scheduler.check_integrity()
    manager = engine.scheduler.exchange
    assert manager is None or manager.manager.in_flight == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_crowd_finishes_in_every_mode(make_engine, mode):
    """More KV cache than the device holds: everybody finishes, with the tokens they asked for."""
    engine = make_engine(num_blocks=12, max_num_seqs=4, fastserve={"swap_mode": mode})
    crowd(engine)
    drained(engine)
    assert [len(tokens) for tokens in engine.outputs.values()] == [200] * 4
    assert free_blocks(engine) == 11
    counters = engine.scheduler.planner.counters
    swaps = counters.swapped_out + counters.spilled
    assert (swaps > 0) == (mode != "recompute")
    assert (counters.recomputed > 0) == (mode == "recompute")


def test_what_was_copied_is_not_computed_again(make_engine):
    """With swap, every token is computed once; without, some are computed over and over."""
    computed = {}
    for mode in MODES:
        engine = make_engine(num_blocks=12, max_num_seqs=4, fastserve={"swap_mode": mode})
        crowd(engine)
        computed[mode] = 0
        while engine.busy:
            computed[mode] += sum(engine.step().values())
    needed = 4 * (60 + 200 - 1)
    assert computed["proactive"] == computed["reactive"] == needed < computed["recompute"]


def test_blocks_leave_only_when_the_copy_was_reported(make_engine):
    """While a copy is under way its source stays allocated, and its job does not run."""
    engine = make_engine(num_blocks=12, max_num_seqs=4, copy_steps=3)
    crowd(engine)
    for _ in range(300):
        run(engine)
        leaving = [j for j in engine.scheduler.planner.jobs if j.state is JobState.SWAPPING_OUT]
        if leaving:
            break
    job = leaving[0]
    held = engine.scheduler.kv_cache_manager.get_block_ids(job.job_id)
    assert held[0]
    for _ in range(3):
        assert job.job_id not in engine.step()
        if job.state is JobState.SWAPPING_OUT:
            assert engine.scheduler.kv_cache_manager.get_block_ids(job.job_id) == held
    assert job.state in (JobState.SWAPPED, JobState.SWAPPING_IN)
    drained(engine)


def test_host_copies_are_reused(make_engine):
    """A second swap-out of a request copies only what was written since the first."""
    engine = make_engine(num_blocks=14, max_num_seqs=4)
    crowd(engine, count=5, output=300)
    drained(engine)
    counters = engine.scheduler.exchange.manager.counters
    assert counters.again_out_blocks > 0
    assert counters.again_out_copied < counters.again_out_blocks / 2


@pytest.mark.parametrize("wanted", [JobState.SWAPPING_OUT, JobState.SWAPPED, JobState.SWAPPING_IN])
def test_abort_leaves_no_trace(make_engine, wanted):
    """Aborted while its KV cache moves or is away: no block stays behind, on neither side."""
    engine = make_engine(num_blocks=12, max_num_seqs=4, copy_steps=2)
    requests = crowd(engine)
    for _ in range(600):
        run(engine)
        found = [r.request_id for r in requests if state(engine, r.request_id) is wanted]
        if found:
            break
    engine.abort(found[0])
    engine.scheduler.check_integrity()
    for request in requests:
        engine.abort(request.request_id)
    drained(engine)
    manager = engine.scheduler.exchange.manager
    assert free_blocks(engine) == 11
    assert manager.free_blocks == engine.scheduler.exchange.host_blocks
    assert not engine.scheduler.requests


def test_a_full_host_means_recompute(make_engine):
    """Nobody is stuck and nobody is lost where the host has no room at all."""
    tiny = {"swap_space_gib": 9e-6}  # one block of 8 KiB
    engine = make_engine(num_blocks=12, max_num_seqs=4, fastserve=tiny)
    assert engine.scheduler.exchange.host_blocks == 1
    crowd(engine)
    drained(engine)
    assert [len(tokens) for tokens in engine.outputs.values()] == [200] * 4
    assert engine.scheduler.planner.counters.recomputed > 0


@pytest.mark.parametrize("running", [False, True])
def test_reset_prefix_cache_in_mid_swap(make_engine, running):
    """Weights changed: nothing that was computed before is used again, wherever it is."""
    engine = make_engine(num_blocks=12, max_num_seqs=4, copy_steps=2)
    crowd(engine)
    for _ in range(40):
        run(engine, 5)
        done = engine.scheduler.reset_prefix_cache(reset_running_requests=running)
        engine.scheduler.check_integrity()
        if running:
            assert done
            assert free_blocks(engine) == 11
            states = engine.scheduler.planner.roster.counts()
            assert states[JobState.SWAPPED] == states[JobState.SWAPPING_IN] == 0
    drained(engine)
    assert [len(tokens) for tokens in engine.outputs.values()] == [200] * 4


def test_pausing_admission_in_mid_swap(make_engine):
    """Paused for new requests, the engine finishes those on the device and nothing hangs."""
    engine = make_engine(num_blocks=12, max_num_seqs=4, copy_steps=2)
    crowd(engine)
    run(engine, 60)
    engine.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    for _ in range(1000):
        if not engine.scheduler.has_unfinished_requests():
            break
        run(engine)
    assert not engine.scheduler.has_unfinished_requests()
    engine.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    run(engine, 3)
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    drained(engine)
    assert [len(tokens) for tokens in engine.outputs.values()] == [200] * 4


def test_shared_prefix_is_copied_once(make_engine):
    """Blocks that the prefix cache shares between requests have one copy on the host."""
    engine = make_engine(num_blocks=14, max_num_seqs=4, enable_prefix_caching=True)
    prefix = list(range(1000, 1064))
    for i in range(5):
        engine.add(f"r{i}", [*prefix, 2000 + i], 200)
    drained(engine)
    assert [len(tokens) for tokens in engine.outputs.values()] == [200] * 5
    assert engine.scheduler.exchange.manager.counters.blocks_shared > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"async_scheduling": True}, {"pipeline_parallel_size": 2}])
@pytest.mark.parametrize("caching", [False, True])
def test_random_traffic_obeys_the_laws(make_engine, mode, options, caching):
    """Random arrivals, lengths, aborts, resets and priorities; laws hold after every step."""
    rng = random.Random(f"{mode}{options}{caching}")
    engine = make_engine(
        num_blocks=24,
        max_num_seqs=6,
        max_num_batched_tokens=128,
        enable_prefix_caching=caching,
        copy_steps=rng.randrange(4),
        fastserve={"swap_mode": mode, "swap_space_gib": rng.choice([4e-3, 5e-4, 1e-4])},
        **options,
    )
    wanted, aborted = {}, set()
    for _step in range(600):
        if rng.random() < 0.12:
            name, output = f"r{len(wanted)}", rng.randrange(1, 120)
            shared = [5] * rng.choice([0, 32, 64, 70])
            prompt = shared + [rng.randrange(10, 500) for _ in range(rng.randrange(1, 180))]
            engine.add(name, prompt, output, priority=rng.choice([0, 0, 0, -1]))
            wanted[name] = output
        if rng.random() < 0.01 and engine.scheduler.requests:
            name = rng.choice(list(engine.scheduler.requests))
            engine.abort(name)
            aborted.add(name)
        if rng.random() < 0.004:
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)
        engine.step()
        engine.scheduler.check_integrity()
    drained(engine)
    assert free_blocks(engine) == 23
    for name, output in wanted.items():
        if name not in aborted:
            assert len(engine.outputs[name]) == output, name
    if engine.scheduler.exchange is not None:
        manager = engine.scheduler.exchange.manager
        assert manager.free_blocks == engine.scheduler.exchange.host_blocks
    assert all(r.status != RequestStatus.RUNNING for r in engine.scheduler.requests.values())
    assert {t.direction for t in engine.transfers} <= set(Direction)


@pytest.mark.parametrize("policy", ["fastserve", "mlfq", "fcfs", "fixed-priority"])
def test_every_policy_swaps_ahead_of_need(make_engine, policy):
    """Whatever orders the jobs: who is paused for an urgent one leaves and comes back."""
    engine = make_engine(14, {"policy": policy}, max_num_seqs=2)
    for i in range(5):
        engine.add(f"r{i}", 60 + 10 * i, 90)
        run(engine, 3)
    for i in range(6):
        engine.add(f"urgent{i}", 100, 20, priority=-1)
        run(engine, 12)
    drained(engine)
    counters = engine.scheduler.planner.counters
    assert counters.swapped_out + counters.spilled > 0
    assert [len(tokens) for tokens in engine.outputs.values()].count(90) == 5
