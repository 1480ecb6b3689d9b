"""In-process engines on the tiny model, and requests whose greedy output can be compared."""

import gc
import random
from contextlib import contextmanager
from dataclasses import dataclass

from vllm import SamplingParams

ENGINE_ARGS = {
    # vLLM's "auto" would turn the float32 model into bfloat16, where exact ties of logits appear.
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "block_size": 32,
    "kv_cache_memory_bytes": 64 << 20,
}


@contextmanager
def running(llm_class, model, **args):
    """An `LLM` that is shut down at the end of the block."""
    llm = llm_class(model, **{**ENGINE_ARGS, **args})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def scheduler_of(llm):
    """The scheduler object of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


@dataclass(frozen=True)
class Workload:
    """Prompts as token ids, and how many tokens to generate for each."""

    prompts: list[list[int]]
    max_tokens: list[int]

    def generate(self, llm, **sampling):
        """Greedy output token ids, by request."""
        params = [greedy(tokens, **sampling) for tokens in self.max_tokens]
        prompts = [{"prompt_token_ids": prompt} for prompt in self.prompts]
        return [out.outputs[0].token_ids for out in llm.generate(prompts, params, use_tqdm=False)]


def greedy(max_tokens, **sampling):
    """Sampling parameters of a request that always generates `max_tokens` tokens."""
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **sampling)


def workload(requests=24, seed=0):
    """Short and long prompts, half of which share a prefix, with short and long outputs."""
    rng = random.Random(seed)
    prefix = [rng.randrange(10, 2000) for _ in range(96)]
    prompts = [
        prefix * (i % 2) + [rng.randrange(10, 2000) for _ in range(rng.choice([3, 20, 90, 200]))]
        for i in range(requests)
    ]
    return Workload(prompts, [rng.choice([1, 5, 20, 60]) for _ in prompts])
