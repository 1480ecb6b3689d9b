"""Steps in flight: asynchronous scheduling and pipeline parallelism, without a model."""

import random

import pytest
from vllm.config import KVTransferConfig

pytestmark = pytest.mark.host_versions

ASYNC = {"async_scheduling": True}
PIPELINE = {"pipeline_parallel_size": 2}


def test_asynchronous_steps_run_the_same_batch_again(make_engine):
    """With one step in flight, a decode is scheduled again before its token is known."""
    engine = make_engine(max_num_seqs=2, **ASYNC)
    engine.add("a", 10, 5)
    assert engine.schedule().num_scheduled_tokens == {"a": 10}
    assert engine.schedule().num_scheduled_tokens == {"a": 1}


def test_place_of_a_last_token_in_flight_is_not_idle(make_engine):
    """A request whose last token is in flight leaves its place to the next one at once."""
    engine = make_engine(max_num_seqs=1, **ASYNC)
    engine.add("a", 10, 2)
    engine.add("b", 10, 2)
    table = [engine.step() for _ in range(4)]
    assert [list(s) for s in table] in ([["a"], ["a"], ["b"], ["b"]], [["a"], ["b"], ["a"], ["b"]])


def test_pipeline_batches_are_disjoint_and_no_stage_idles(make_engine):
    """Each stage gets its own batch: no request is in two, none idles while one could run."""
    engine = make_engine(max_num_seqs=2, **PIPELINE)
    for name in "abcd":
        engine.add(name, 10, 9)
    previous: set[str] = set()
    for _ in range(12):
        batch = set(engine.step())
        assert not batch & previous
        assert len(batch) == 2
        previous = batch


@pytest.mark.parametrize("mode", [{}, ASYNC, PIPELINE], ids=["sync", "async", "pipeline"])
@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("num_blocks", [48, 2048])
def test_random_traffic_conserves_requests_and_blocks(make_engine, mode, v2, num_blocks):
    """Random arrivals and aborts: integrity after every step, every token and block accounted."""
    rng = random.Random(num_blocks)
    engine = make_engine(
        num_blocks, max_num_seqs=8, max_num_active_seqs=5, max_model_len=1024, **mode
    )
    engine.scheduler.use_v2_model_runner = v2
    wanted, aborted = {}, set()
    for i in range(600):
        if rng.random() < 0.3:
            wanted[f"r{i}"] = rng.randint(1, 60)
            engine.add(
                f"r{i}", rng.randint(1, 200), wanted[f"r{i}"], priority=rng.choice((0, 0, 1))
            )
        if rng.random() < 0.05 and engine.scheduler.requests:
            victim = rng.choice(list(engine.scheduler.requests))
            engine.abort(victim)
            aborted.add(victim)
        engine.step()
        engine.scheduler.check_integrity()
    engine.drain()
    while engine.in_flight:
        engine.complete()
    finished = {name: len(tokens) for name, tokens in engine.outputs.items() if name not in aborted}
    assert finished == {name: n for name, n in wanted.items() if name not in aborted}
    assert len(engine.scheduler.planner) == 0
    assert engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == num_blocks - 1


def producer(path):
    """A user's connector that hands a finished request's KV cache to another engine."""
    return KVTransferConfig(
        kv_connector="ExampleConnector",
        kv_role="kv_producer",
        kv_connector_extra_config={"shared_storage_path": str(path)},
    )


def test_output_in_flight_is_dropped_where_kv_is_handed_over(make_engine, tmp_path):
    """Delivered, it might finish a request whose KV cache was just given up: the other engine would
    get garbage.
    """
    engine = make_engine(
        8,
        {"swap_mode": "recompute"},
        max_num_seqs=3,
        kv_transfer_config=producer(tmp_path),
        **ASYNC,
    )
    assert engine.scheduler.requires_kv_delivery
    requests = [engine.add(name, 50, 60) for name in "abc"]
    stale = []
    for number in range(100):
        if number % 10 == 9:
            requests.append(engine.add(f"urgent-{number}", 60, 3, priority=-1))
        engine.schedule()
        stale += [r.drop_stale_output for r in requests if r.num_stale_output_tokens]
        if len(engine.in_flight) > 1:
            engine.complete()
    assert stale, "nobody was preempted with output in flight"
    assert all(stale)
    engine.drain()
    assert {len(engine.outputs[name]) for name in "abc"} == {60}


def test_an_output_without_a_schedule_is_taken_in(make_engine):
    """Another part of the engine may complete a step that this scheduler did not plan."""
    engine = make_engine(max_num_seqs=1)
    engine.add("a", 10, 3)
    output = engine.schedule()
    engine.scheduler.timer._scheduled_at.clear()
    engine.complete()
    assert output.num_scheduled_tokens == {"a": 10}
    engine.drain()
    assert len(engine.outputs["a"]) == 3
