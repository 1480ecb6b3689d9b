"""Greedy tokens under KV swap against stock vLLM with ample KV cache, in every way to run it.

    python tests/exactness.py MODEL [--requests 2000] [--only proactive] [--jobs 2]

The device has KV blocks for about a fifth of what 64 requests want. Blocks are poisoned before they
are filled from the host, so that no missing copy can pass.
"""

import argparse
import itertools
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from subprocess_generate import generate
from tqdm import tqdm

MODES = ("proactive", "reactive", "recompute")
CACHING = (False, True)
CHUNKS = {"small chunks": 128, "large chunks": 2048}
PIPELINE = {
    "pipeline_parallel_size": 2,
    "distributed_executor_backend": "mp",
    # The eager runner of a later stage has no intermediate tensors to start from.
    "enforce_eager": False,
    "compilation_config": {"mode": 1, "backend": "eager"},
}
RUNNERS = {
    "sync": {},
    "async": {},
    "tp 2": {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
    "pp 2": PIPELINE,
}
# Requests hold about 300 tokens on average while they run, so 64 of them want some 600 blocks.
DEVICE_BLOCKS = 121


@dataclass(frozen=True)
class Case:
    """One way to run the engine."""

    mode: str
    runner: str
    caching: bool
    chunk: str

    def __str__(self):
        caching = "prefix caching" if self.caching else "no caching"
        return f"{self.mode}, {self.runner}, {caching}, {self.chunk}"


CASES = tuple(Case(*c) for c in itertools.product(MODES, RUNNERS, CACHING, CHUNKS))


def workload(requests):
    """Arguments that ask for the same requests, whoever serves them."""
    return ["--requests", str(requests), "--lengths", "chat", "--shared-prefix", "96"]


def stock(model, requests, runner="sync"):
    """Stock vLLM with ample KV cache.

    Tensor parallelism adds up in another order, so that of half a million tokens one or two differ
    from those of a single worker, under stock vLLM too: it is the reference for itself.
    """
    engine = {"max_model_len": 2176, "max_num_seqs": 64, **RUNNERS[runner]}
    arguments = [*workload(requests), "--stock", "--engine", json.dumps(engine)]
    return generate(model, *arguments, asynchronous=False)["tokens"]


def run(model, case, requests):
    """FastServe, short of KV blocks."""
    engine = {
        "max_model_len": 2176,
        "max_num_seqs": 64,
        "num_gpu_blocks_override": DEVICE_BLOCKS,
        "enable_prefix_caching": case.caching,
        "max_num_batched_tokens": CHUNKS[case.chunk],
        "enable_chunked_prefill": True,
        **RUNNERS[case.runner],
    }
    # A small base quantum and many levels: as much preemption as can be had.
    fastserve = {"swap_mode": case.mode, "swap_space_gib": 0.25, "base_quantum_s": 0.002}
    arguments = ["--engine", json.dumps(engine), "--fastserve", json.dumps(fastserve)]
    # vLLM's V1 model runner refuses asynchronous scheduling with pipeline parallelism.
    asynchronous = case.runner == "async"
    return generate(model, *workload(requests), *arguments, poison=True, asynchronous=asynchronous)


def faults(case, result, expected):
    """What is wrong with a run; empty where nothing is."""
    differing = sum(a != b for a, b in zip(result["tokens"], expected, strict=True))
    moved = result["swapped_out"] + result["spilled"]
    found = []
    if differing:
        found.append(f"{differing} requests differ")
    if result["free_blocks"] != result["blocks"] or result.get("host_blocks_held"):
        found.append("blocks are still held")
    if (moved > 0) != (case.mode != "recompute") or result.get("failed"):
        found.append("nothing moved, or a copy failed")
    return ", ".join(found)


def reference_of(case):
    """The runner whose tokens, under stock vLLM, are the case's."""
    # One worker's tokens do not depend on whether its steps overlap.
    return "sync" if case.runner == "async" else case.runner


def report(case, result, expected, seconds):
    """What became of a case, in a line, and whether something is wrong with it."""
    fault = faults(case, result, expected)
    names = ("swapped_out", "spilled", "saved", "swapped_in", "blocks_in", "recomputed")
    moved = ", ".join(f"{name} {result[name]}" for name in names if name in result)
    return f"{case}: {fault or 'identical'} ({moved}; {seconds:.0f} s)", bool(fault)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    args = parser.parse_args()
    cases = [case for case in CASES if args.only in str(case)]
    print(f"{args.requests} requests, {DEVICE_BLOCKS - 1} device blocks")
    references = {}
    for runner in dict.fromkeys(map(reference_of, cases)):
        references[runner] = stock(args.model, args.requests, runner)
        print(f"stock vLLM, {runner}: {sum(map(len, references[runner]))} tokens")

    def measured(case):
        started = time.monotonic()
        result = run(args.model, case, args.requests)
        return report(case, result, references[reference_of(case)], time.monotonic() - started)

    bad = 0
    with ThreadPoolExecutor(args.jobs) as threads:
        for line, wrong in tqdm(threads.map(measured, cases), total=len(cases), unit="case"):
            tqdm.write(line)
            bad += wrong
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
