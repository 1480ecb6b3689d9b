"""Faults in a real engine: tokens stay stock vLLM's, and nothing stays behind."""

import itertools

import pytest
from tiny_engine import greedy, running, scheduler_of

from fastserve_vllm import LLM
from fastserve_vllm.kv_swap.copies import SynchronousCopies

STARVED = {"max_num_seqs": 8, "num_gpu_blocks_override": 24}
CONFIG = {"base_quantum_s": 0.002, "starvation_limit_s": 0.3}
TWO_BLOCKS = {"swap_space_gib": 7e-5}


def assert_clean(scheduler):
    scheduler.check_integrity()
    assert not scheduler.planner.jobs
    assert scheduler.kv_cache_manager.usage == 0


@pytest.fixture
def failing_copies(monkeypatch):
    """Every third copy raises in the worker; returns the calls so far."""
    calls, copy = itertools.count(1), SynchronousCopies._copy_runs
    failed = []

    def fails(self, transfer):
        if next(calls) % 3 == 0:
            failed.append(transfer)
            raise OSError("the host memory is gone")
        copy(self, transfer)

    monkeypatch.setattr(SynchronousCopies, "_copy_runs", fails)
    return failed


@pytest.mark.host_versions
@pytest.mark.parametrize("mode", ["proactive", "reactive"])
def test_copies_that_fail_in_the_worker(tiny_model, requests, stock_tokens, failing_copies, mode):
    """Their requests compute again, to the same tokens."""
    config = {**CONFIG, "swap_mode": mode}
    with running(LLM, tiny_model, fastserve_config=config, **STARVED) as llm:
        assert requests.generate(llm) == stock_tokens
        assert failing_copies
        assert scheduler_of(llm).exchange.manager.counters.failed > 0
        assert_clean(scheduler_of(llm))


def test_host_memory_for_two_blocks(tiny_model, requests, stock_tokens):
    """A host pool that is always full: who has to leave computes again, to the same tokens."""
    config = {**CONFIG, **TWO_BLOCKS}
    with running(LLM, tiny_model, fastserve_config=config, **STARVED) as llm:
        assert scheduler_of(llm).exchange.host_blocks == 2
        assert requests.generate(llm) == stock_tokens
        assert scheduler_of(llm).planner.counters.recomputed > 0
        assert_clean(scheduler_of(llm))


def test_urgent_request_is_in_the_next_batch(tiny_model):
    """All places and all blocks are taken: who is urgent runs in the step after it arrived."""
    tight = {"max_num_seqs": 3, "num_gpu_blocks_override": 17}
    with running(LLM, tiny_model, fastserve_config=CONFIG, **tight) as llm:
        scheduler, engine = scheduler_of(llm), llm.llm_engine
        for number in range(4):
            prompt = {"prompt_token_ids": [10 + number] * 120}
            engine.add_request(f"long-{number}", prompt, greedy(200))
        pool = scheduler.kv_cache_manager.block_pool
        while pool.get_num_free_blocks() > 1 or len(scheduler.running) < 2:
            engine.step()
        # Within the least chunk of a prefill, so that its first step is its only one.
        urgent = {"prompt_token_ids": list(range(10, 130))}
        engine.add_request("urgent", urgent, greedy(3), priority=-1)
        engine.step()
        (name,) = [r.request_id for r in scheduler.running if r.request_id.startswith("urgent")]
        assert scheduler.requests[name].num_output_tokens == 1
        finished = []
        while engine.has_unfinished_requests():
            finished += [output for output in engine.step() if output.finished]
        assert finished[0].request_id == "urgent"
        assert sorted(len(o.outputs[0].token_ids) for o in finished) == [3, 200, 200, 200, 200]
        while scheduler.kv_cache_manager.usage:
            engine.step()
        assert_clean(scheduler)
