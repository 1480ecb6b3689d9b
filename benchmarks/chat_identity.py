"""Greedy chat answers of a real model under FastServe and under stock vLLM, token by token.

    python -m benchmarks.chat_identity --model .models/smollm2-135m-instruct \
        --output benchmarks/results/chat_identity_smollm2.json

Each system runs in a process of its own, with fewer batch places than conversations, so that
FastServe preempts all the time; afterwards both must have written the same tokens.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.engine import prepare_environment
from benchmarks.manifest import manifest, write_json

_TOPICS = (
    "the capital of France",
    "how rain forms",
    "a scheduler for a kitchen",
    "prime numbers below 20",
    "the colour of the sky",
    "why ice floats",
    "a haiku about queues",
    "the largest planet",
)
_REQUESTS = (
    "In one sentence, tell me about {}.",
    "Explain {} to a child.",
    "List three facts about {}.",
    "Write a short poem about {}.",
    "What is a common mistake about {}?",
    "Ask me a question about {}.",
    "Summarize {} in five words.",
    "Tell me a story that involves {}.",
)


def conversations() -> list[list[dict[str, str]]]:
    """64 one-turn conversations."""
    return [
        [{"role": "user", "content": request.format(topic)}]
        for topic in _TOPICS
        for request in _REQUESTS
    ]


def answer(system: str, args: argparse.Namespace) -> dict[str, Any]:
    """Every conversation's tokens under a system, and how often it preempted."""
    from vllm import SamplingParams

    if system == "fastserve":
        from fastserve_vllm import LLM
    else:
        from vllm import LLM
    llm = LLM(
        str(args.model),
        dtype=args.dtype,
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=args.batch,
        block_size=32,
        kv_cache_memory_bytes=1 << 30,
    )
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    outputs = llm.chat(conversations(), params, use_tqdm=True)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    planner = getattr(scheduler, "planner", None)
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "first_answer": outputs[0].outputs[0].text,
        "preemptions": 0 if planner is None else planner.counters.paused,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run both systems and compare; returns 1 where a token differs."""
    parser = argparse.ArgumentParser(description="Greedy chat answers, token by token.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args(argv)
    prepare_environment()
    context = multiprocessing.get_context("spawn")
    results = {}
    for system in ("vllm-fcfs", "fastserve"):
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as executor:
            results[system] = executor.submit(answer, system, args).result()
    pairs = zip(results["vllm-fcfs"]["tokens"], results["fastserve"]["tokens"], strict=True)
    differing = [i for i, (stock, ours) in enumerate(pairs) if stock != ours]
    document = {
        "manifest": manifest({"arguments": {k: str(v) for k, v in vars(args).items()}}),
        "conversations": len(conversations()),
        "tokens": sum(len(tokens) for tokens in results["fastserve"]["tokens"]),
        "preemptions": results["fastserve"]["preemptions"],
        "differing": differing,
        "first_answer": results["fastserve"]["first_answer"],
    }
    print(json.dumps({k: v for k, v in document.items() if k != "manifest"}, indent=2))
    if args.output is not None:
        write_json(args.output, document)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
