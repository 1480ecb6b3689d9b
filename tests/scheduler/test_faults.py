"""Faults on purpose, on vLLM's own scheduler objects: nothing is lost and nothing stays behind."""

import random

import pytest
from fuzz_engine import FuzzEngine
from vllm.config import DiffusionConfig
from vllm.v1.core.sched.interface import PauseState

from fastserve_vllm.config import CHECK_EVERY, ConfigError
from fastserve_vllm.policy.job import JobState
from fastserve_vllm.testing import ModelFreeEngine, vllm_config

pytestmark = pytest.mark.host_versions

BLOCKS = 12


@pytest.fixture
def failing_engine(tiny_model):
    """Builds an engine whose copies fail: `failing_engine(rate, **engine_args)`."""

    def build(rate, fastserve=None, **args):
        settings = {"swap_space_gib": 0.004, "base_quantum_s": 0.001, **(fastserve or {})}
        config = vllm_config(tiny_model, settings, max_num_seqs=4, **args)
        return FuzzEngine(config, BLOCKS, dice=random.Random(rate), failure_rate=rate)

    return build


def assert_clean(engine, blocks=BLOCKS):
    engine.scheduler.check_integrity()
    assert not engine.scheduler.requests
    assert len(engine.scheduler.planner) == 0
    assert engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == blocks - 1
    exchange = engine.scheduler.exchange
    assert exchange.manager.free_blocks == exchange.host_blocks


@pytest.mark.parametrize("rate", [0.1, 1.0])
@pytest.mark.parametrize("mode", ["proactive", "reactive"])
@pytest.mark.parametrize("steps", [{}, {"async_scheduling": True}, {"pipeline_parallel_size": 3}])
def test_copies_that_fail_lose_no_request(failing_engine, rate, mode, steps):
    """Whether some or all copies fail: every request computes again and gets all of its tokens."""
    engine = failing_engine(rate, {"swap_mode": mode}, **steps)
    for i in range(8):
        engine.add(f"r{i}", 60, 150)
    while engine.busy:
        engine.step()
        engine.scheduler.check_integrity()
    while engine.in_flight:
        engine.complete()
    assert [len(tokens) for tokens in engine.outputs.values()] == [150] * 8
    assert engine.failed > 0 or rate < 1
    assert_clean(engine)


@pytest.mark.parametrize("jump_s", [-1e6, -1.0, -1e-3, 1.0, 1e6])
@pytest.mark.parametrize("inside", [False, True], ids=["between steps", "inside a step"])
def test_clock_jumps(make_engine, jump_s, inside):
    """A clock that jumps in either direction: at most the one step is charged wrongly, nobody gets
    service back, and none hangs.
    """
    engine = make_engine(max_num_seqs=2, fastserve={"step_time_profile": None})
    engine.clock.now_s = 1e6
    for i in range(6):
        engine.add(f"r{i}", 20, 400)
    for _ in range(200):
        engine.step()
    policy = engine.scheduler.planner.policy
    quantum_s, clock_s = policy.ladder.base_s, policy._service_s
    if inside:
        engine.schedule()
    engine.clock.now_s += jump_s
    if inside:
        engine.complete()
    for _ in range(400):
        engine.step()
        engine.scheduler.check_integrity()
    wrong_s = jump_s if inside and jump_s > 0 else 0.0
    assert policy._service_s - clock_s == pytest.approx(0.4 + wrong_s, abs=0.0021)
    assert policy.ladder.base_s == pytest.approx(quantum_s)
    engine.drain()
    assert {len(tokens) for tokens in engine.outputs.values()} == {400}


def test_a_step_of_a_hundred_times_the_usual(make_engine):
    """It costs those that ran one level, and leaves the ladder and the levels of arrivals alone."""
    engine = make_engine(max_num_seqs=2, fastserve={"step_time_profile": None})
    slow = iter([False] * 300 + [True])
    engine.step_s = lambda _: 0.1 if next(slow, False) else 0.001
    for i in range(4):
        engine.add(f"r{i}", 20, 300)
    for _ in range(300):
        engine.step()
    level, base_s = _join_level(engine, "before"), engine.scheduler.planner.policy.ladder.base_s
    levels = {job: job.level for job in engine.scheduler.planner.jobs}
    for _ in range(3):
        engine.step()
    assert all(job.level <= levels.get(job, 0) + 1 for job in engine.scheduler.planner.jobs)
    assert _join_level(engine, "after") == level
    assert engine.scheduler.planner.policy.ladder.base_s == pytest.approx(base_s)
    engine.drain()


def _join_level(engine, name):
    engine.add(name, 200, 1)
    return engine.scheduler._jobs[name].level


def test_steps_without_tokens(make_engine):
    """Empty steps, of a paused engine and of one that waits for copies, charge nobody."""
    engine = make_engine(max_num_seqs=1)
    for name in "ab":
        engine.add(name, 10, 30)
    for _ in range(3):
        engine.step()
    before = [engine.scheduler.planner.policy.attained_service_s(j) for j in jobs(engine)]
    engine.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    for _ in range(50):
        engine.clock.now_s += 10.0
        assert engine.step() == {}
        engine.scheduler.check_integrity()
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    assert [engine.scheduler.planner.policy.attained_service_s(j) for j in jobs(engine)] == before
    engine.drain()
    assert {name: len(tokens) for name, tokens in engine.outputs.items()} == {"a": 30, "b": 30}


def jobs(engine):
    return sorted(engine.scheduler.planner.jobs, key=lambda job: job.job_id)


def test_thousands_of_aborts_in_one_step(make_engine):
    """4,000 clients go away at once, in every state; those that stay are served."""
    engine = make_engine(60, max_num_seqs=8, copy_steps=2)
    for i in range(4100):
        engine.add(f"r{i}", 40, 60)
    seen = set()
    for _ in range(400):
        engine.step()
        seen |= {job.state for job in engine.scheduler.planner.jobs}
    assert {JobState.QUEUED, JobState.RUNNING, JobState.PAUSED, JobState.SWAPPED} <= seen
    stay = [name for name in list(engine.scheduler.requests) if name.endswith("7")][:20]
    gone = [name for name in engine.scheduler.requests if name not in stay]
    assert len(gone) >= 4000
    engine.abort(*gone)
    engine.scheduler.check_integrity()
    assert len(engine.scheduler.planner) == len(stay)
    engine.drain()
    assert all(len(engine.outputs[name]) == 60 for name in stay)
    assert_clean(engine, 60)


@pytest.mark.parametrize("mode", ["proactive", "reactive", "recompute"])
@pytest.mark.parametrize("steps", [{}, {"async_scheduling": True}])
def test_urgent_request_is_in_the_next_batch(make_engine, mode, steps):
    """All places, slots and blocks are taken: who is urgent displaces somebody at once."""
    engine = make_engine(BLOCKS, {"swap_mode": mode}, max_num_seqs=3, **steps)
    for i in range(3):
        engine.add(f"r{i}", 100, 200)
    for _ in range(6):
        engine.step()
    pool = engine.scheduler.kv_cache_manager.block_pool
    while pool.get_num_free_blocks() > 0:
        engine.step()
    assert len(engine.scheduler.running) >= 2
    engine.add("urgent", 90, 5, priority=-1)
    table = [engine.step() for _ in range(3)]
    engine.scheduler.check_integrity()
    # A step in flight may still write the blocks of its batch: they are free when it has ended.
    assert "urgent" in table[1 if steps else 0], table
    engine.drain()
    assert len(engine.outputs["urgent"]) == 5
    assert {len(engine.outputs[f"r{i}"]) for i in range(3)} == {200}


def test_diffusion_models_are_refused(tiny_model):
    """They need vLLM's own scheduler; the message says how to start them."""
    config = vllm_config(tiny_model, {})
    config.diffusion_config = DiffusionConfig(canvas_length=16)
    with pytest.raises(ConfigError, match=r"diffusion models .* without --scheduler fastserve"):
        ModelFreeEngine(config)


@pytest.mark.parametrize(("every", "checks"), [("0", 0), ("1", 12), ("5", 2)])
def test_integrity_is_checked_under_a_switch(make_engine, monkeypatch, every, checks):
    """`FASTSERVE_CHECK_EVERY=N` checks in every N-th step, and not at all by default."""
    monkeypatch.setenv(CHECK_EVERY, every)
    engine, seen = make_engine(), []
    monkeypatch.setattr(engine.scheduler, "check_integrity", lambda: seen.append(1))
    engine.add("a", 10, 50)
    for _ in range(12):
        engine.step()
    assert len(seen) == checks


def test_a_broken_law_stops_a_checked_engine(make_engine, monkeypatch):
    """The check names the law."""
    monkeypatch.setenv(CHECK_EVERY, "1")
    engine = make_engine()
    request = engine.add("a", 10, 50)
    engine.step()
    engine.scheduler.left_out[request] = None
    with pytest.raises(AssertionError, match="I1"):
        engine.step()


@pytest.mark.parametrize("text", ["-1", "often", "1.5", ""])
def test_a_bad_switch_is_refused(make_engine, monkeypatch, text):
    """A typo does not switch the checks off silently."""
    monkeypatch.setenv(CHECK_EVERY, text)
    with pytest.raises(ConfigError, match="FASTSERVE_CHECK_EVERY"):
        make_engine()
