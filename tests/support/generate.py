"""Generates greedily on a tiny model in a process of its own and prints what came out as JSON."""

import argparse
import json
import os
import random

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--engine", type=json.loads, default={})
    parser.add_argument("--fastserve", type=json.loads, default={})
    args = parser.parse_args()
    from vllm import SamplingParams

    if args.stock:
        from vllm import LLM

        selected = {}
    else:
        from fastserve_vllm import LLM

        selected = {"fastserve_config": args.fastserve}
    defaults = {"max_model_len": 1024, "max_num_seqs": 6, "block_size": 32, "dtype": "float32"}
    llm = LLM(
        args.model,
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        **{**defaults, **args.engine},
        **selected,
    )
    rng = random.Random(0)
    prompts = [
        {"prompt_token_ids": [rng.randint(10, 2000) for _ in range(rng.randint(2, 200))]}
        for _ in range(args.requests)
    ]
    params = [
        SamplingParams(temperature=0, ignore_eos=True, max_tokens=rng.randint(1, 120))
        for _ in prompts
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    result = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "async_scheduling": scheduler.scheduler_config.async_scheduling,
        "free_blocks": pool.get_num_free_blocks(),
        "blocks": pool.num_gpu_blocks - 1,
    }
    if not args.stock:
        scheduler.check_integrity()
        counters = scheduler.planner.counters
        result |= {"paused": counters.paused, "recomputed": counters.recomputed}
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
