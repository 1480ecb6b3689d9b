"""`fastserve_vllm.AsyncLLM`: the engine in a process of its own."""

import asyncio

import pytest
from tiny_engine import ENGINE_ARGS, greedy
from vllm import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind

from fastserve_vllm import AsyncLLM, select


@pytest.fixture
def engine_args(tiny_model):
    return AsyncEngineArgs(tiny_model, max_num_seqs=4, **ENGINE_ARGS)


async def test_concurrent_streams(engine_args, requests, stock_tokens):
    """Streams that run at a time get stock's tokens; one that is left early is aborted."""
    engine = AsyncLLM.from_engine_args(engine_args, fastserve_config={"base_quantum_s": 0.002})

    async def tokens(number):
        params = greedy(requests.max_tokens[number], output_kind=RequestOutputKind.DELTA)
        prompt = {"prompt_token_ids": requests.prompts[number]}
        found = []
        async for output in engine.generate(prompt, params, str(number)):
            found += output.outputs[0].token_ids
        return found

    async def leave():
        async for _ in engine.generate("leave early", greedy(400), "left"):
            return

    try:
        numbers = range(len(requests.prompts))
        found, _ = await asyncio.gather(asyncio.gather(*map(tokens, numbers)), leave())
        assert found == stock_tokens
        assert engine.vllm_config.scheduler_config.scheduler_cls.endswith("FastServeScheduler")
    finally:
        engine.shutdown()


def test_selecting_twice_is_refused(engine_args):
    """A second configuration would silently lose to the first."""
    with pytest.raises(ValueError, match="selected already"):
        AsyncLLM.from_engine_args(select(engine_args))
