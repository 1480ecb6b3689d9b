"""The scheduler's own time a step, against the number of queued requests and against stock vLLM.

    python -m benchmarks.scheduler_overhead --output benchmarks/results/scheduler_overhead.json

Real vLLM scheduler objects, no model: a stand-in answers every step. Requests have ShareGPT-like
lengths (log-normal); each one that finishes is replaced, so that the queue keeps its length. "Own"
is what FastServe adds around vLLM's `schedule()` and `update_from_output()`; "whole" is all of it.
"Burst" is the start, when all requests arrive at once and every step swaps its whole batch; the
other figures are taken once each request has had some 80 steps of service, as in a queue that
overload has built up.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.cli import json_object
from benchmarks.engine import prepare_environment
from benchmarks.manifest import write_output
from benchmarks.model import model_folder


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="The scheduler's own time a step.")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--queued", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--sync-only", action="store_true")
    parser.add_argument("--warm-turns", type=int, default=80)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fastserve-config", type=json_object, default={}, help="JSON")
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=None)
    return parser.parse_args(argv)


_TURN_STEPS = 50


class ClosedLoop:
    """Keeps `live` requests in an engine without a model."""

    def __init__(self, engine: Any, live: int, seed: int) -> None:
        self.engine = engine
        self._random = random.Random(seed)
        self._live = live
        self._count = 0
        self.top_up()

    def top_up(self) -> None:
        """Replace what has finished."""
        while len(self.engine.scheduler.requests) < self._live:
            prompt = min(1 + int(self._random.lognormvariate(3.8, 1.3)), 1024)
            output = min(1 + int(self._random.lognormvariate(5.4, 0.9)), 1000)
            self.engine.add(f"r{self._count}", [7] * prompt, output)
            self._count += 1


def _engine(fastserve: dict[str, Any] | None, async_: bool, args: argparse.Namespace) -> Any:
    from fastserve_vllm.testing import ModelFreeEngine, vllm_config

    config = vllm_config(
        str(model_folder(args.model)),
        fastserve,
        max_num_seqs=args.batch,
        async_scheduling=async_,
        enable_prefix_caching=False,
    )
    scheduler_cls = config.scheduler_config.get_scheduler_cls()
    make = None if fastserve is not None else scheduler_cls
    return ModelFreeEngine(config, num_blocks=400_000, make=make, step_s=_step_s)


def _step_s(output: Any) -> float:
    tokens = output.total_num_scheduled_tokens
    requests = len(output.num_scheduled_tokens)
    return 0.0014 + 21e-6 * (tokens - requests) + 30e-6 * requests


class Sample:
    """One engine with a queue of constant length, and what its steps took."""

    def __init__(self, engine: Any, queued: int, seed: int, args: argparse.Namespace) -> None:
        self._loop = ClosedLoop(engine, args.batch + queued, seed)
        self._reporter = getattr(engine.scheduler, "reporter", None)
        self._engine = engine
        self._warm = max(args.warm_turns * (args.batch + queued) // args.batch, 200)
        self._own: list[float] = []
        self._whole: list[float] = []
        self.steps(self._warm)

    def steps(self, count: int) -> None:
        """Run steps, each timed alone."""
        for _ in range(count):
            before = self._reporter.scheduler_s if self._reporter is not None else 0.0
            started = time.perf_counter()
            self._engine.step()
            self._whole.append(time.perf_counter() - started)
            if self._reporter is not None:
                self._own.append(self._reporter.scheduler_s - before)
            self._loop.top_up()

    def figures(self) -> dict[str, float]:
        """Microseconds a step: the median, and the mean, which holds the rare dear ones."""
        warm = self._warm
        figures = {
            **_summary("whole", self._whole[warm:]),
            **_summary("whole_burst", self._whole[:200]),
        }
        if self._own:
            figures |= {
                **_summary("own", self._own[warm:]),
                **_summary("own_burst", self._own[:200]),
            }
        return figures


def measure(
    fastserve: dict[str, Any] | None, async_: bool, seed: int, args: argparse.Namespace
) -> list[dict[str, float]]:
    """Figures for each queue length. They take turns, for a shared machine changes its speed."""
    samples = [Sample(_engine(fastserve, async_, args), n, seed, args) for n in args.queued]
    gc.collect()
    gc.freeze()
    for _ in range(args.steps // _TURN_STEPS):
        for sample in samples:
            sample.steps(_TURN_STEPS)
    gc.unfreeze()
    return [sample.figures() for sample in samples]


def _summary(name: str, seconds: list[float]) -> dict[str, float]:
    return {
        f"{name}_median_us": 1e6 * statistics.median(seconds),
        f"{name}_mean_us": 1e6 * statistics.fmean(seconds),
    }


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every case: stock and FastServe, synchronous and asynchronous, each queue length and seed."""
    modes = (False,) if args.sync_only else (False, True)
    cases = [(system, async_) for async_ in modes for system in (None, args.fastserve_config)]
    rows = []
    for fastserve, async_ in tqdm(cases, unit="case"):
        seeds = [measure(fastserve, async_, seed, args) for seed in args.seeds]
        for queued, samples in zip(args.queued, zip(*seeds, strict=True), strict=True):
            medians = {key: statistics.median(s[key] for s in samples) for key in samples[0]}
            rows.append(
                {
                    "system": "vllm-fcfs" if fastserve is None else "fastserve",
                    "async_scheduling": async_,
                    "batch": args.batch,
                    "queued": queued,
                    **medians,
                    "seeds": samples,
                }
            )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print a table."""
    args = parse_arguments(argv)
    prepare_environment()
    rows = run(args)
    columns = (
        "own_median_us",
        "own_mean_us",
        "own_burst_mean_us",
        "whole_median_us",
        "whole_mean_us",
    )
    print("| system | async | queued | " + " | ".join(columns) + " |")
    print("| --- " * (3 + len(columns)) + "|")
    for row in rows:
        figures = " | ".join(f"{row[c]:.1f}" if c in row else "-" for c in columns)
        print(f"| {row['system']} | {row['async_scheduling']} | {row['queued']} | {figures} |")
    write_output(args, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
