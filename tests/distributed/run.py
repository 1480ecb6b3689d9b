"""Every way to spread an engine over workers, over HTTP and short of KV cache, beside stock vLLM.

    python tests/distributed/run.py MODEL --out benchmarks/results/distributed.json [--only ray]

For each: tokens are those of stock vLLM on one worker, every worker copied, nothing stays behind.
Then the gap between tokens where memory is ample, FastServe's server and stock vLLM's in turns.
Rows are added to those that the file has; docs/distributed.md shows them.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import vllm
from driving import copies_of, gaps_of, held_blocks, tokens_of, total, wait_until_idle
from layouts import FASTSERVE, LAYOUTS, PRESSURE
from ray_node import ray_node
from serving import serving
from tiny_engine import running, workload
from tqdm import tqdm

from benchmarks.manifest import manifest, write_json

REQUESTS, ROUNDS = 80, 15
MOVED = ("swapped_out", "swapped_in", "saved", "copies_failed")


def measure(layout, model, expected, requests, folder):
    """One layout's row."""
    base = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    poison = {"FASTSERVE_TEST_POISON": "1"}
    with ExitStack() as stack:
        address = None
        if layout.ray:
            node = layout.environment(base, "", **poison)
            del node["RAY_ADDRESS"]
            workers = layout.engines * layout.ranks
            address = stack.enter_context(ray_node(node, gpus=2 * workers))

        def server(name, *flags, **variables):
            env = layout.environment(base, address, **variables)
            flags = [*PRESSURE, *layout.flags, *layout.extra, *flags]
            return stack.enter_context(serving(model, flags, env, folder / f"{name}.log"))

        ours = server("fastserve", *FASTSERVE, **poison)
        tokens = asyncio.run(tokens_of(ours, requests))
        wait_until_idle(ours)
        differing = sum(a != b for a, b in zip(tokens, expected, strict=True))
        row = describe(layout, ours) | {"requests": len(tokens), "differing": differing}
        return row | gaps(ours, server("stock"))


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


def add(path, row):
    """Put a row into the file, in the place of an older one of its layout."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    key = (row["layout"], row["executor"])
    rows = [old for old in rows if (old["layout"], old["executor"]) != key] + [row]
    order = {(layout.name, layout.executor): n for n, layout in enumerate(LAYOUTS)}
    rows.sort(key=lambda one: order[one["layout"], one["executor"]])
    config = {"requests": REQUESTS, "rounds": ROUNDS, "engine": PRESSURE, "fastserve": FASTSERVE}
    write_json(path, {"manifest": manifest(config), "rows": rows})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, default=None, help="file to add the rows to")
    parser.add_argument("--only", default="", help="layouts whose name contains this")
    args = parser.parse_args()
    requests = workload(REQUESTS)
    with running(vllm.LLM, args.model, max_num_seqs=32) as llm:
        expected = requests.generate(llm)
    bad = 0
    logs = Path(tempfile.mkdtemp(prefix="distributed"))
    print(f"servers log to {logs}")
    for layout in tqdm([layout for layout in LAYOUTS if args.only in str(layout)], unit="layout"):
        folder = logs / str(layout).replace(", ", "-").replace(" ", "-")
        folder.mkdir()
        try:
            row = measure(layout, args.model, expected, requests, folder)
        except Exception as error:
            tqdm.write(f"{layout}: {type(error).__name__}: {error}")
            bad += 1
            continue
        bad += bool(fault := faults(row))
        figures = {k: row[k] for k in ("copies", "gap_ms", "stock_gap_ms", "gap_ratio")}
        tqdm.write(f"{layout}: {fault or 'identical'} {json.dumps(figures)}")
        if args.out is not None and not fault:
            add(args.out, row)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
