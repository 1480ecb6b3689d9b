"""Generates greedily on a tiny model in a process of its own and prints what came out as JSON."""

import argparse
import json
import os
import random

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def small(rng):
    """(prompt tokens, output tokens) of a small request."""
    return rng.randint(2, 200), rng.randint(1, 120)


def chat(rng):
    """Likewise, of a request whose lengths are spread like those of ShareGPT's conversations."""
    prompt = min(1 + int(rng.lognormvariate(3.8, 1.3)), 1024)
    return prompt, min(1 + int(rng.lognormvariate(4.9, 1.2)), 1000)


LENGTHS = {"small": small, "chat": chat}


def requests(lengths, count, shared_prefix):
    """Prompts and output lengths; every other prompt may begin like the others."""
    rng = random.Random(0)
    prefix = [rng.randint(10, 2000) for _ in range(shared_prefix)]
    prompts, outputs = [], []
    for number in range(count):
        prompt, output = LENGTHS[lengths](rng)
        tokens = [rng.randint(10, 2000) for _ in range(prompt)]
        prompts.append({"prompt_token_ids": prefix * (number % 2) + tokens})
        outputs.append(output)
    return prompts, outputs


def parse_arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--lengths", choices=LENGTHS, default="small")
    parser.add_argument("--shared-prefix", type=int, default=0)
    parser.add_argument("--engine", type=json.loads, default={})
    parser.add_argument("--fastserve", type=json.loads, default={})
    return parser.parse_args()


def main():
    args = parse_arguments()
    from vllm import SamplingParams

    if args.stock:
        from vllm import LLM

        selected = {}
    else:
        from fastserve_vllm import LLM

        selected = {"fastserve_config": args.fastserve}
    defaults = {
        "max_model_len": 1024,
        "max_num_seqs": 6,
        "block_size": 32,
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 64 << 20,
    }
    llm = LLM(args.model, **{**defaults, **args.engine}, **selected)
    prompts, lengths = requests(args.lengths, args.requests, args.shared_prefix)
    params = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=n) for n in lengths]
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
        result |= counters(scheduler)
    print("RESULT " + json.dumps(result))


def counters(scheduler):
    """What moved and what was lost."""
    counted = scheduler.planner.counters
    names = ("paused", "recomputed", "spilled", "swapped_out", "swapped_in", "saved")
    moved = {name: getattr(counted, name) for name in names}
    if scheduler.exchange is not None:
        manager = scheduler.exchange.manager
        moved["failed"] = manager.counters.failed
        moved["blocks_in"] = manager.counters.blocks_in
        moved["host_blocks_held"] = manager.host_blocks - manager.free_blocks
    return moved


if __name__ == "__main__":
    main()
