"""What a step schedules, on vLLM's own scheduler objects. Tables read {request: tokens}."""

import itertools
import random

import pytest
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

from fastserve_vllm.config import FastServeConfig
from fastserve_vllm.policy.job import JobState
from fastserve_vllm.policy.step_time import StepShape, load_profile
from fastserve_vllm.step_timer import StepTimer

pytestmark = pytest.mark.host_versions


def steps(engine, count):
    table = [engine.step() for _ in range(count)]
    engine.scheduler.check_integrity()
    return table


def state(engine, request_id):
    return engine.scheduler._jobs[request_id].state


def free_blocks(engine):
    return engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def test_arrival_displaces_a_running_request(make_engine):
    """An arrival enters level 0 and takes the place of whoever used up that level's quantum."""
    engine = make_engine(max_num_seqs=1)
    engine.add("a", 10, 50)
    assert steps(engine, 3) == [{"a": 10}, {"a": 1}, {"a": 1}]
    engine.add("b", 10, 50)
    assert steps(engine, 1) == [{"b": 10}]
    assert state(engine, "a") is JobState.PAUSED


def test_paused_request_keeps_its_blocks_and_goes_on(make_engine):
    """A preempted request resumes with one token: nothing is computed twice."""
    engine = make_engine(max_num_seqs=1)
    a = engine.add("a", 40, 6)
    steps(engine, 2)
    held = engine.scheduler.kv_cache_manager.get_block_ids("a")
    engine.add("b", 10, 1)
    assert steps(engine, 2) == [{"b": 10}, {"a": 1}]
    assert engine.scheduler.kv_cache_manager.get_block_ids("a") == held
    assert a.num_preemptions == 0


def test_skip_join_lets_the_shorter_prompt_pass(make_engine):
    """A long prompt joins a lower level, so a short one that came later runs first."""
    engine = make_engine(max_num_seqs=1)
    engine.add("long", 600, 4)
    engine.add("short", 10, 2)
    assert [list(s) for s in steps(engine, 2)] == [["short"], ["short"]]
    assert engine.scheduler._jobs["long"].level == 3  # 7 ms: the first quantum above is 8 ms


def test_naive_mlfq_joins_at_the_top(make_engine):
    """Without skip-join the long prompt is served first, at level 0."""
    engine = make_engine(max_num_seqs=1, fastserve={"policy": "mlfq"})
    engine.add("long", 600, 4)
    engine.add("short", 10, 2)
    assert steps(engine, 1) == [{"long": 600}]


def test_priority_is_a_class_above_the_levels(make_engine):
    """An urgent request displaces a running one, and keeps its place however long it runs."""
    engine = make_engine(max_num_seqs=1)
    engine.add("a", 10, 50)
    steps(engine, 1)
    engine.add("urgent", 10, 4, priority=-1)
    assert [list(s) for s in steps(engine, 5)] == [["urgent"]] * 4 + [["a"]]


def test_starved_request_is_promoted(make_engine):
    """Short requests keep arriving; the long one runs again after the starvation limit."""
    engine = make_engine(max_num_seqs=1, fastserve={"starvation_limit_s": 0.02})
    engine.add("old", 10, 200)
    steps(engine, 3)
    turns = []
    for i in range(60):
        engine.add(f"new{i}", 5, 1)
        turns += [i for name in engine.step() if name == "old"]
    assert 19 <= turns[0] <= 21
    assert all(later - turn <= 22 for turn, later in itertools.pairwise([*turns, 60]))


def test_token_budget_goes_to_the_first_in_order(make_engine):
    """A running prefill sits out rather than take tokens from a queued prompt ahead of it."""
    engine = make_engine(max_num_seqs=4, max_num_batched_tokens=256)
    engine.add("long", 600, 4)
    assert steps(engine, 1) == [{"long": 256}]
    engine.add("short", 100, 4)
    assert steps(engine, 3) == [{"short": 100}, {"short": 1, "long": 255}, {"short": 1, "long": 89}]


def test_one_prefill_takes_the_rest_and_leaves_decodes_their_token(make_engine):
    """Decodes that stand behind a long prompt still run: no place idles for want of one token."""
    engine = make_engine(max_num_seqs=4, max_num_batched_tokens=128)
    engine.add("decode", 10, 50)
    steps(engine, 4)
    engine.add("long", 300, 4, priority=-1)
    assert steps(engine, 2) == [{"decode": 1, "long": 127}] * 2


def test_unchunked_prefill_waits_for_a_step_of_its_own(make_engine):
    """With chunked prefill off, a prompt runs whole or not at all."""
    engine = make_engine(
        max_num_seqs=4, max_num_batched_tokens=512, max_model_len=512, enable_chunked_prefill=False
    )
    engine.add("a", 400, 8)
    engine.add("b", 300, 8)
    table = steps(engine, 2)
    assert sorted(s.get("a", 0) for s in table)[-1] == 400
    assert sorted(s.get("b", 0) for s in table)[-1] == 300


def test_max_num_active_seqs_bounds_the_batch(make_engine):
    """The batch limit is `max_num_active_seqs`, not the number of model-runner slots."""
    engine = make_engine(max_num_seqs=8, max_num_active_seqs=3)
    for i in range(6):
        engine.add(f"r{i}", 5, 5)
    assert [len(s) for s in steps(engine, 3)] == [3, 3, 3]


def test_full_device_recomputes_whoever_runs_last(make_engine):
    """When blocks run out, the last of the order gives its KV cache up; the batch keeps its own."""
    mode = {"swap_mode": "recompute"}
    engine = make_engine(5, mode, max_num_seqs=1)  # four usable blocks of 32 tokens
    a = engine.add("a", 60, 30)
    steps(engine, 4)
    b = engine.add("b", 60, 30)
    steps(engine, 1)
    engine.add("c", 60, 2)
    table = steps(engine, 3)
    assert [list(s) for s in table] == [["b"], ["c"], ["c"]]
    assert (a.num_preemptions, b.num_preemptions) == (0, 1)
    assert state(engine, "b") is JobState.QUEUED
    engine.drain()
    assert {k: len(v) for k, v in engine.outputs.items()} == {"a": 30, "b": 30, "c": 2}
    assert free_blocks(engine) == 4


def test_shared_prefix_does_not_count_twice(make_engine):
    """A prompt whose prefix another request holds needs blocks for the rest only: nobody is
    preempted for it.
    """
    engine = make_engine(max_num_seqs=2, num_blocks=8, enable_prefix_caching=True)
    shared = list(range(10, 138))  # four blocks
    a = engine.add("a", [*shared, *range(200, 210)], 40)
    steps(engine, 2)
    engine.add("b", [*shared, *range(300, 310)], 4)
    assert steps(engine, 1) == [{"a": 1, "b": 10}]
    assert a.num_preemptions == 0


def test_cached_prefix_lets_a_long_prompt_join_at_the_top(make_engine):
    """Skip-join counts the prompt tokens that have to be computed."""
    engine = make_engine(max_num_seqs=2, enable_prefix_caching=True)
    prompt = list(range(10, 10 + 640))
    engine.add("a", prompt, 1)
    engine.drain()
    engine.add("b", [*prompt, 7, 8], 1)
    assert engine.scheduler._jobs["b"].level == 1


def test_lora_limit_holds_for_running_and_queued(make_engine):
    """No step mixes more adapters than `max_loras`; a request without one fills the place."""
    engine = make_engine(max_num_seqs=3, enable_lora=True, max_loras=1, max_lora_rank=8)
    adapters = {i: LoRARequest(f"adapter{i}", i, f"/nowhere/{i}") for i in (1, 2)}
    engine.add("a", 5, 20, lora_request=adapters[1])
    engine.add("b", 5, 20, lora_request=adapters[2])
    engine.add("c", 5, 20)
    table = steps(engine, 6)
    assert all("c" in step and len(step) == 2 for step in table)
    assert {name for step in table for name in step} == {"a", "b", "c"}


def test_paused_engine_schedules_nothing_and_forgets_nothing(make_engine):
    """PAUSED_ALL: empty steps; afterwards work goes on where it stood."""
    engine = make_engine()
    for name in "abc":
        engine.add(name, 10, 5)
    steps(engine, 2)
    engine.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    assert steps(engine, 2) == [{}, {}]
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.drain()
    assert {k: len(v) for k, v in engine.outputs.items()} == {"a": 5, "b": 5, "c": 5}


def test_paused_for_new_requests_drains_those_that_hold_kv(make_engine):
    """PAUSED_NEW: running and paused requests finish, however many queued ones precede them."""
    engine = make_engine(max_num_seqs=1)
    engine.add("a", 10, 4)
    steps(engine, 2)
    for i in range(30):
        engine.add(f"new{i}", 10, 4)
    engine.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    assert engine.drain() <= 3
    assert list(engine.outputs) == ["a"]
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.drain()
    assert len(engine.outputs) == 31


class Grammar:
    """Stands for a grammar that compiles; vLLM polls `grammar`."""

    def __init__(self, request):
        self.request = request
        request.structured_output_request = self
        request.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR

    grammar = None
    reasoning_ended = True


def test_compiling_grammar_blocks_only_its_own_request(make_engine):
    """A request whose grammar compiles is passed over, and joins as soon as it is ready."""
    engine = make_engine(max_num_seqs=2)
    request = engine.request("g", 10, 3)
    grammar = Grammar(request)
    engine.scheduler.add_request(request)
    engine.add("a", 10, 9)
    assert steps(engine, 2) == [{"a": 10}, {"a": 1}]
    assert state(engine, "g") is JobState.BLOCKED
    grammar.grammar = object()
    assert engine.schedule().num_scheduled_tokens == {"g": 10, "a": 1}


def test_failed_grammar_ends_its_request_alone(make_engine):
    """A grammar that does not compile ends its request with an error; nothing stays behind."""
    engine = make_engine()
    request = engine.request("g", 10, 3)
    Grammar(request).grammar = ValueError("no such grammar")
    engine.scheduler.add_request(request)
    engine.add("a", 10, 2)
    engine.drain()
    assert list(engine.scheduler.requests) == []
    assert len(engine.scheduler.planner) == 0


def test_streaming_session_waits_for_input_and_rejoins(make_engine):
    """A session that waits for input takes no part; its next turn joins like an arrival."""
    engine = make_engine(max_num_seqs=3)
    engine.add("s", 10, 2, resumable=True)
    engine.add("a", 10, 6)
    steps(engine, 3)
    assert state(engine, "s") is JobState.BLOCKED
    assert engine.scheduler.num_waiting_for_streaming_input == 1
    engine.add("s", 5, 2, resumable=True)
    assert "s" in steps(engine, 1)[0]
    while "a" in engine.scheduler.requests:
        steps(engine, 1)
    engine.abort("s")
    assert len(engine.scheduler.planner) == 0


@pytest.mark.parametrize("when", ["blocked", "queued", "running", "paused", "recomputed"])
def test_abort_leaves_no_trace(make_engine, when):
    """Whatever state a request is aborted in, no job, queue entry or block remains."""
    engine = make_engine(max_num_seqs=1, num_blocks=4 if when == "recomputed" else 64)
    request = engine.request("x", 40, 30)
    if when == "blocked":
        Grammar(request)
    engine.scheduler.add_request(request)
    if when in ("running", "paused", "recomputed"):
        steps(engine, 4)
    if when in ("paused", "recomputed"):
        engine.add("y", 60, 2)
        steps(engine, 1)
    engine.abort("x")
    engine.scheduler.check_integrity()
    engine.drain()
    assert not engine.scheduler.requests
    assert len(engine.scheduler.planner) == 0
    assert free_blocks(engine) == engine.config.cache_config.num_gpu_blocks - 1


def test_reset_prefix_cache_takes_the_kv_of_paused_requests_too(make_engine):
    """A forced reset preempts running and paused requests alike, and all of them finish."""
    engine = make_engine(max_num_seqs=1, enable_prefix_caching=True)
    for name in "abc":
        engine.add(name, 40, 5)
    steps(engine, 4)
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.scheduler.check_integrity()
    assert engine.scheduler.get_request_counts() == (0, 3)
    engine.drain()
    assert {k: len(v) for k, v in engine.outputs.items()} == {"a": 5, "b": 5, "c": 5}


def test_unforced_reset_fails_while_paused_requests_hold_kv(make_engine):
    """Without force, a reset is refused as long as a paused request holds blocks."""
    engine = make_engine(max_num_seqs=1, enable_prefix_caching=True)
    engine.add("a", 40, 9)
    steps(engine, 3)
    engine.add("b", 40, 9)
    steps(engine, 1)
    assert not engine.scheduler.reset_prefix_cache()
    engine.scheduler.check_integrity()


def test_paused_requests_count_as_running(make_engine):
    """vLLM's own figures see paused requests as running: they hold KV cache."""
    engine = make_engine(max_num_seqs=1)
    for name in "abc":
        engine.add(name, 10, 9)
    steps(engine, 3)
    assert engine.scheduler.get_request_counts() == (2, 1)
    assert engine.scheduler.make_stats().num_running_reqs == 2


def test_residents_are_bounded_by_slots_on_the_v2_runner(make_engine):
    """The V2 runner keeps a slot for a paused request: no more than `max_num_seqs` of them."""
    engine = make_engine(max_num_seqs=3, max_num_active_seqs=1)
    engine.scheduler.use_v2_model_runner = True
    for i in range(8):
        engine.add(f"r{i}", 10, 20)
        steps(engine, 2)
        assert engine.scheduler.planner.roster.num_residents <= 3
    engine.drain()
    assert {len(tokens) for tokens in engine.outputs.values()} == {20}


@pytest.mark.parametrize("chunk", [64, 2048])
def test_fcfs_schedules_what_stock_vllm_schedules(make_engine, chunk):
    """With the policy `fcfs` every step equals stock vLLM's, token for token."""

    def run(**kind):
        engine = make_engine(max_num_seqs=4, max_num_batched_tokens=chunk, **kind)
        rng = random.Random(7)
        table = []
        for i in range(200):
            if rng.random() < 0.2:
                engine.add(f"r{i}", rng.randint(2, 300), rng.randint(1, 30))
            table.append(engine.step())
        return table

    assert run(stock=True) == run(fastserve={"policy": "fcfs"})


def test_profile_is_saved_when_the_engine_runs_dry(make_engine, tmp_path):
    """The learned step times are written without waiting for a shutdown, and can pin a run."""
    path = tmp_path / "learned.json"
    learning = {"step_time_profile": None, "save_step_time_profile": str(path)}
    engine = make_engine(fastserve=learning)
    engine.add("a", 10, 5)
    engine.drain()
    assert load_profile(str(path)).min_decode_step_s == pytest.approx(0.001)


def test_the_first_engine_saves_the_profile(tmp_path):
    """Data-parallel engines share the configuration, and would write into each other's file."""
    config = FastServeConfig(save_step_time_profile=str(tmp_path / "learned.json"))
    for engine in (1, 0):
        timer = StepTimer(config, engine)
        timer.step_time.observe(StepShape(decodes=1), 0.001)
        timer.save(0.0)
        assert list(tmp_path.iterdir()) == ([] if engine else [tmp_path / "learned.json"])


def test_prior_base_quantum_gives_way_to_the_first_decode_step(make_engine):
    """On a machine slower than the prior assumes, quanta grow with the first decode step seen."""
    engine = make_engine(fastserve={"step_time_profile": None})
    engine.step_s = lambda _: 0.08
    engine.add("a", 10, 5)
    steps(engine, 4)
    assert engine.scheduler.planner.policy.ladder.base_s == pytest.approx(0.08)
