"""Every way to spread an engine over workers, over HTTP and short of KV cache, beside stock vLLM.

    python tests/distributed/run.py MODEL --out benchmarks/results/distributed.json [--only ray]
    python tests/distributed/run.py MODEL --out ... --failures

For each: tokens are those of stock vLLM on one worker, every worker copied, nothing stays behind.
Then the gap between tokens where memory is ample, FastServe's server and stock vLLM's in turns.
With `--failures`, one worker of two is killed or stopped in the middle of a copy, or its copy goes
no further. Rows are added to those that the file has; docs/distributed.md shows them.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import vllm
from driving import copies_of, gaps_of, held_blocks, tokens_of, total, wait_until_idle
from failing import KINDS, fail
from layouts import FASTSERVE, LAYOUTS, PRESSURE
from ray_node import ray_node
from serving import serving
from tiny_engine import running, workload
from tqdm import tqdm

from benchmarks.manifest import manifest, write_json

REQUESTS, ROUNDS = 80, 15
STEP_TIMEOUT_S = 15
START_TIMEOUT_S = 600
MOVED = ("swapped_out", "swapped_in", "saved", "copies_failed")
FAILING = ("tensor parallel 2, mp", "pipeline 2, mp", "tensor parallel 2, ray")


class Bench:
    """Starts servers of one layout.

    Args:
        layout: which.
        model: path of a model folder.
        folder: where servers log.
    """

    def __init__(self, layout, model, folder):
        self.layout, self._model, self._folder = layout, model, folder
        self._env = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        self._address = None

    @contextmanager
    def ready(self, **variables):
        """With a Ray node, where the layout needs one; its workers get the variables."""
        workers = self.layout.engines * self.layout.ranks
        env = self.layout.environment(self._env, "", **variables)
        env.pop("RAY_ADDRESS", None)
        node = ray_node(env, gpus=2 * workers) if self.layout.ray else nullcontext()
        with node as self._address:
            yield self

    def serve(self, name, *flags, **variables):
        """A server for the length of a block."""
        env = self.layout.environment(self._env, self._address, **variables)
        flags = [*PRESSURE, *self.layout.flags, *self.layout.extra, *flags]
        return serving(self._model, flags, env, self._folder / f"{name}.log", START_TIMEOUT_S)

    @contextmanager
    def serve_both(self, *, stock, **variables):
        """FastServe's server, and stock vLLM's if wanted; they start at once."""
        servers = [self.serve("fastserve", *FASTSERVE, **variables)]
        servers += [self.serve("stock")] * stock
        with ExitStack() as stack, ThreadPoolExecutor() as pool:
            yield list(pool.map(stack.enter_context, servers))


def measure(bench, expected, requests, *, step_times):
    """One layout's row."""
    poison = {"FASTSERVE_TEST_POISON": "1"}
    with bench.ready(**poison), bench.serve_both(stock=step_times, **poison) as servers:
        ours = servers[0]
        tokens = asyncio.run(tokens_of(ours, requests))
        wait_until_idle(ours)
        differing = sum(a != b for a, b in zip(tokens, expected, strict=True))
        row = describe(bench.layout, ours) | {"requests": len(tokens), "differing": differing}
        return row | (gaps(*servers) if step_times else {})


def describe(layout, server):
    """What was served how, what moved, and what is left."""
    return {
        "layout": layout.name,
        "executor": layout.executor,
        "command": layout.command,
        "engines": layout.engines,
        "ranks": layout.ranks,
        "copies": {"/".join(map(str, key)): n for key, n in sorted(copies_of(server).items())},
        "blocks_held": held_blocks(server),
        **{name: total(server, f"vllm:fastserve_{name}_total") for name in MOVED},
    }


def gaps(ours, stock):
    """Median gap between tokens on both servers, round by round in turns."""
    rounds = []
    for _ in range(ROUNDS):
        ours_s, stock_s = (asyncio.run(gaps_of(server)) for server in (ours, stock))
        rounds.append((statistics.median(ours_s), statistics.median(stock_s)))
    ratios = sorted(one / other for one, other in rounds)
    return {
        "gap_ms": 1e3 * statistics.median(one for one, _ in rounds),
        "stock_gap_ms": 1e3 * statistics.median(other for _, other in rounds),
        "gap_ratio": statistics.median(ratios),
        "gap_ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
    }


def faults(row):
    """What is wrong with a row; empty where nothing is."""
    copies = row["copies"]
    found = []
    if row["differing"]:
        found.append(f"{row['differing']} requests differ")
    for engine in range(row["engines"]):
        for way in ("out", "in"):
            of_ranks = {copies.get(f"{engine}/{r}/{way}", 0) for r in range(row["ranks"])}
            if len(of_ranks) != 1 or 0 in of_ranks:
                found.append(f"engine {engine} copied {way} by rank: {of_ranks}")
    if row["blocks_held"] or row["copies_failed"]:
        found.append("blocks are still held, or a copy failed")
    return ", ".join(found)


def failure(bench, kind, requests, folder):
    """How a server ends when one of its two workers fails in the middle of a copy."""
    variables = {
        "FASTSERVE_TEST_HOLD": str(folder),
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(STEP_TIMEOUT_S),
    }
    with bench.ready(**variables), bench.serve("failing", *FASTSERVE, **variables) as server:
        end = asyncio.run(fail(server, kind, folder, requests))
    layout = bench.layout
    row = {"layout": layout.name, "executor": layout.executor, "kind": kind} | end
    fault = "" if "EngineDeadError" in end["errors"] and end["refused"] else f"ended: {end}"
    return row, fault


def add(path, part, row, *key):
    """Put a row into a part of the file, in the place of an older one of the same key."""
    document = json.loads(path.read_text()) if path.exists() else {"rows": [], "failures": []}
    config = {"requests": REQUESTS, "rounds": ROUNDS, "engine": PRESSURE, "fastserve": FASTSERVE}
    config |= {"execute_model_timeout_s": STEP_TIMEOUT_S} if part == "failures" else {}
    same = [row[name] for name in key]
    rows = [old for old in document[part] if [old[name] for name in key] != same]
    rows.append(row | {"manifest": manifest(config)})
    order = {(layout.name, layout.executor): n for n, layout in enumerate(LAYOUTS)}
    rows.sort(key=lambda one: order[one["layout"], one["executor"]])
    write_json(path, document | {part: rows})


def run_layouts(args, layouts, logs):
    """Measure layouts; returns how many went wrong."""
    requests, bad = workload(REQUESTS), 0
    with running(vllm.LLM, args.model, max_num_seqs=32) as llm:
        expected = requests.generate(llm)
    for layout in tqdm(layouts, unit="layout"):
        folder = Path(tempfile.mkdtemp(dir=logs))
        try:
            bench = Bench(layout, args.model, folder)
            row = measure(bench, expected, requests, step_times=not args.tokens_only)
            fault = faults(row)
        except Exception as error:
            row, fault = {}, f"{type(error).__name__}: {error}; see {folder}"
        bad += bool(fault)
        tqdm.write(f"{layout}: {fault or 'identical'} {row.get('copies')} {row.get('gap_ratio')}")
        if args.out is not None and not fault:
            add(args.out, "rows", row, "layout", "executor")
    return bad


def run_failures(args, layouts, logs):
    """Let workers fail; returns how many servers did not end as they should."""
    bad = 0
    cases = [(layout, kind) for layout in layouts if str(layout) in FAILING for kind in KINDS]
    for layout, kind in tqdm(cases, unit="failure"):
        folder = Path(tempfile.mkdtemp(dir=logs))
        try:
            row, fault = failure(
                Bench(layout, args.model, folder), kind, workload(REQUESTS), folder
            )
        except Exception as error:
            row, fault = {}, f"{type(error).__name__}: {error}; see {folder}"
        bad += bool(fault)
        tqdm.write(f"{layout}, {kind}: {fault or row}")
        if args.out is not None and not fault:
            add(args.out, "failures", row, "layout", "executor", "kind")
    return bad


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, default=None, help="file to add the rows to")
    parser.add_argument("--only", default="", help="layouts whose name contains this")
    parser.add_argument("--failures", action="store_true", help="let workers fail instead")
    parser.add_argument("--tokens-only", action="store_true", help="leave step times out")
    args = parser.parse_args()
    layouts = [layout for layout in LAYOUTS if args.only in str(layout)]
    logs = tempfile.mkdtemp(prefix="distributed")
    print(f"servers log to {logs}")
    bad = (run_failures if args.failures else run_layouts)(args, layouts, logs)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
