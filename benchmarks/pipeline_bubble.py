"""Idle time of pipeline stages: FastServe against stock vLLM.

    python -m benchmarks.pipeline_bubble --output benchmarks/results/pipeline_bubble.json

Real vLLM scheduler objects, no model: the stages are virtual, and each takes an equal share of a
step's time (`virtual_clock`). Batches enter and leave as in vLLM's engine: one is scheduled while
fewer are in flight than vLLM allows, otherwise the oldest is waited for. The bubble is the share of
the stages' time, while requests are unfinished, in which a stage computes nothing. Lengths are
ShareGPT-like (log-normal); memory is ample.

The batch limit bounds what stock vLLM has in all batches in flight together, and what FastServe has
in each. So stock vLLM also runs with as many times the limit as there are stages.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.engine import prepare_environment
from benchmarks.manifest import write_output
from benchmarks.model import model_folder
from benchmarks.virtual_clock import step_shape

BURST = "burst"


@dataclass(frozen=True)
class Setting:
    """A pipeline: how many stages, and whether steps overlap (the V2 runner's way) as well."""

    stages: int
    overlap: bool


SETTINGS = (Setting(2, overlap=False), Setting(4, overlap=False), Setting(2, overlap=True))
# Whether it is FastServe, and whether its batch limit is multiplied by the stages.
SYSTEMS = {
    "vllm": (False, False),
    "vllm, limit x stages": (False, True),
    "fastserve": (True, False),
}


class Pipeline:
    """Drives a scheduler through virtual stages and adds up how long each of them computes."""

    def __init__(self, config: Any, stages: int, stock: bool) -> None:
        from fastserve_vllm.testing import ModelFreeEngine

        make = config.scheduler_config.get_scheduler_cls() if stock else None
        self.engine = ModelFreeEngine(config, 100_000, make, step_s=self._left_s)
        self._share = 1.0 / stages
        self._free_s = [0.0] * stages
        self._ends_s: dict[int, float] = {}
        self.busy_s = 0.0
        self.open_s = 0.0

    def run(self, arrivals: list[tuple[float, int, int]]) -> None:
        """Serve requests, (seconds, prompt tokens, output tokens) each, in order of arrival."""
        engine, waiting = self.engine, list(reversed(arrivals))
        clock = engine.clock
        while waiting or engine.busy:
            if not engine.busy:
                clock.now_s = max(clock.now_s, waiting[-1][0])
            while waiting and waiting[-1][0] <= clock.now_s:
                _, prompt, output = waiting.pop()
                engine.add(f"r{len(waiting)}", [7] * prompt, output)
            before_s = clock.now_s
            self._step()
            self.open_s += clock.now_s - before_s

    def _step(self) -> None:
        """Schedule a batch; then wait for the oldest where no more may be in flight."""
        engine = self.engine
        if engine.scheduler.has_requests():
            output = engine.schedule()
            if output.total_num_scheduled_tokens:
                self._enter(output)
            else:
                self._ends_s[id(output)] = engine.clock.now_s
            if len(engine.in_flight) < engine.config.max_concurrent_batches:
                return
        engine.complete()

    def _enter(self, output: Any) -> None:
        """Through all stages, each when the batch has left the one before and it is free."""
        takes_s, at_s = step_shape(output).seconds * self._share, self.engine.clock.now_s
        for stage, free_s in enumerate(self._free_s):
            at_s = self._free_s[stage] = max(at_s, free_s) + takes_s
            self.busy_s += takes_s
        self._ends_s[id(output)] = at_s

    def _left_s(self, output: Any) -> float:
        return max(self._ends_s.pop(id(output)) - self.engine.clock.now_s, 0.0)

    @property
    def figures(self) -> dict[str, float]:
        """The bubble, and the seconds in which requests were unfinished."""
        stages = len(self._free_s)
        return {"bubble": 1.0 - self.busy_s / (stages * self.open_s), "open_s": self.open_s}


def arrivals(load: float | str, rate: float, seed: int, count: int) -> list[tuple[float, int, int]]:
    """Requests at a share of a rate, as a Poisson process, or all at once."""
    rng = random.Random(seed)
    found, at_s = [], 0.0
    for _ in range(count):
        if load != BURST:
            at_s += rng.expovariate(float(load) * rate)
        prompt = min(1 + int(rng.lognormvariate(3.8, 1.3)), 1024)
        found.append((at_s, prompt, min(1 + int(rng.lognormvariate(4.6, 0.9)), 600)))
    return found


def serve(
    system: str, setting: Setting, requests: list[tuple[float, int, int]], args: argparse.Namespace
) -> dict[str, float]:
    """One run's figures."""
    from fastserve_vllm.testing import vllm_config

    ours, widened = SYSTEMS[system]
    limit = args.batch * (setting.stages if widened else 1)
    config = vllm_config(
        str(model_folder(args.model)),
        {"swap_mode": "recompute"} if ours else None,
        # The V2 runner keeps a slot for whoever is paused; the batch limit is a number of its own.
        max_num_seqs=1024,
        max_num_active_seqs=limit,
        async_scheduling=setting.overlap,
        pipeline_parallel_size=setting.stages,
        enable_prefix_caching=False,
    )
    config_cls = type(config)
    whether_v2 = config_cls.use_v2_model_runner
    # Steps overlap in a pipeline with the V2 runner only, which itself needs an accelerator.
    config_cls.use_v2_model_runner = setting.overlap
    try:
        pipeline = Pipeline(config, setting.stages, stock=not ours)
        pipeline.run(requests)
    finally:
        config_cls.use_v2_model_runner = whether_v2
    return pipeline.figures


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every setting and load: each system on the same requests, seed by seed."""
    rows = []
    for setting in tqdm(SETTINGS, unit="pipeline"):
        for load in (BURST, *args.loads):
            seeds = []
            for seed in args.seeds:
                burst = arrivals(BURST, 0.0, seed, args.requests)
                rate = args.requests / serve("vllm, limit x stages", setting, burst, args)["open_s"]
                requests = arrivals(load, rate, seed, args.requests)
                seeds.append({name: serve(name, setting, requests, args) for name in SYSTEMS})
            rows.append(
                {"stages": setting.stages, "overlap": setting.overlap, "load": load, "seeds": seeds}
                | {name: _median(seeds, name, "bubble") for name in SYSTEMS}
            )
    return rows


def _median(seeds: list[dict[str, dict[str, float]]], system: str, figure: str) -> float:
    return statistics.median(seed[system][figure] for seed in seeds)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Idle time of pipeline stages.")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--loads", type=float, nargs="*", default=[0.7, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=None)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print a table."""
    args = parse_arguments(argv)
    prepare_environment()
    rows = run(args)
    print("| stages | steps overlap | load | " + " | ".join(SYSTEMS) + " |")
    print("| --- " * (3 + len(SYSTEMS)) + "|")
    for row in rows:
        bubbles = " | ".join(f"{row[name]:.1%}" for name in SYSTEMS)
        print(f"| {row['stages']} | {row['overlap']} | {row['load']} | {bubbles} |")
    write_output(args, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
