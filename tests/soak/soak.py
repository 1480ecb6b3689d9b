"""A server under mixed traffic that leaves, bursts and starves it; afterwards nothing is left.

    make soak MINUTES=N SOAK_ARGS="--seed N --trace CSV --json FILE"

The engine checks its invariants in every 50th step and would stop at the first that is broken.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
from serving import serving
from traffic import Traffic

FLAGS = [
    *("--scheduler", "fastserve", "--max-num-seqs", "8", "--scheduling-policy", "priority"),
    # 39 blocks of 32 tokens are room for two of the longest; the host holds some 80 more.
    *("--num-gpu-blocks-override", "40", "--max-num-batched-tokens", "256"),
    *("--fastserve-config.swap_space_gib", "0.005", "--fastserve-config.base_quantum_s", "0.002"),
    *("--fastserve-config.starvation_limit_s", "1.0"),
]
CHECK_EVERY = 50
SAMPLE_S = 1.0
PREEMPTIONS = "vllm:fastserve_preemptions_total"
JOBS, HOST = "vllm:fastserve_jobs", "vllm:fastserve_host_blocks"
IDLE = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


def lengths(trace=None, count=2000, seed=0):
    """Lengths of requests: those of a trace, or spread like a chat's; they fit 512 tokens."""
    if trace is not None:
        from fastserve_vllm.traces import load_trace

        rows = [(row.prompt_tokens, row.output_tokens) for row in load_trace(Path(trace))]
    else:
        dice = random.Random(seed)
        rows = [
            (1 + int(dice.lognormvariate(3.8, 1.3)), 1 + int(dice.lognormvariate(4.0, 1.0)))
            for _ in range(count)
        ]
    return [(min(prompt, 300), min(output, 200)) for prompt, output in rows]


class Memory:
    """Resident memory of the server's processes in MiB, sampled while it serves."""

    def __init__(self, process):
        self._process = process
        self.samples = []

    async def watch(self):
        while True:
            self.samples.append(self.now())
            await asyncio.sleep(SAMPLE_S)

    def now(self):
        family = [self._process, *self._process.children(recursive=True)]
        return sum(process.memory_info().rss for process in family) / (1 << 20)

    def growth(self):
        """(MiB in the second quarter, MiB in the last): medians."""
        quarter = max(len(self.samples) // 4, 1)
        early = statistics.median(self.samples[quarter : 2 * quarter] or self.samples)
        return early, statistics.median(self.samples[-quarter:])


async def soak(server, minutes, seed=0, trace=None):
    """Traffic for so long, then rest; returns the figures that `verdict` judges."""
    (process,) = server_processes(server)
    memory = Memory(process)
    traffic = Traffic(server.url, server.model, lengths(trace), seed=seed)
    watching = asyncio.create_task(memory.watch())
    begun = time.monotonic()
    await traffic.run(60 * minutes)
    watching.cancel()
    await asyncio.to_thread(server.wait_for, *IDLE, timeout_s=60)
    await asyncio.sleep(1.0)
    metrics = server.metrics()
    early, late = memory.growth()
    return {
        "minutes": round((time.monotonic() - begun) / 60, 2),
        "ends": dict(traffic.tally.ends),
        "wrong": traffic.tally.wrong,
        "preemptions": {
            mode: sum(v for key, v in metrics.items() if key[0] == PREEMPTIONS and mode in key)
            for mode in ("paused", "swapped_out", "spilled", "recomputed")
        },
        "jobs": {key[1]: value for key, value in metrics.items() if key[0] == JOBS and value},
        "host_blocks": {key[1]: value for key, value in metrics.items() if key[0] == HOST},
        "idle": {name: metrics[(name,)] for name in IDLE},
        "rss_mib": {"early": round(early, 1), "late": round(late, 1)},
    }


def server_processes(server):
    """The server's main process, by the port that it was given."""
    port = server.url.rpartition(":")[2]
    mine = psutil.Process().children(recursive=True)
    # Another test's server may have left a dead child behind, which has no command line.
    mine = [p for p in mine if p.status() != psutil.STATUS_ZOMBIE]
    return [p for p in mine if port in p.cmdline() and "serve" in p.cmdline()]


def verdict(figures, rss_tolerance):
    """What is wrong with a soak's figures; nothing when all is well.

    Args:
        rss_tolerance: growth of resident memory that is still called flat, as a share.
    """
    wrong = list(figures["wrong"])
    if figures["jobs"] or any(figures["idle"].values()):
        wrong.append(f"left in the engine: {figures['jobs']} {figures['idle']}")
    kept = {use: n for use, n in figures["host_blocks"].items() if use != "free" and n}
    if kept:
        wrong.append(f"left in host memory: {kept}")
    early, late = figures["rss_mib"]["early"], figures["rss_mib"]["late"]
    if late > early * (1 + rss_tolerance):
        wrong.append(f"memory grew from {early} to {late} MiB")
    preemptions = figures["preemptions"]
    moved = preemptions["spilled"] + preemptions["swapped_out"]
    if min(preemptions["paused"], moved, figures["ends"].get("left", 0)) < 5:
        wrong.append(f"nothing to withstand: {preemptions} {figures['ends']}")
    return wrong


def main():
    parser = argparse.ArgumentParser(description="Soak a server.")
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", help="a CSV as the benchmarks read it")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    env = {**os.environ, "FASTSERVE_CHECK_EVERY": str(CHECK_EVERY)}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with serving(options.model, FLAGS, env, log) as server:
            figures = asyncio.run(soak(server, options.minutes, options.seed, options.trace))
    text = json.dumps(figures, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    sys.exit("; ".join(verdict(figures, rss_tolerance=0.05)) or 0)


if __name__ == "__main__":
    main()
