"""What figures and traces cost the engine, a step.

    python -m benchmarks.observability_overhead --output FILE.json

Real vLLM scheduler objects at a full batch and with a queue, no model, as in `scheduler_overhead`;
here with too little memory, so that KV cache moves and is counted, too. The same requests run
without figures, with figures, and with figures and a trace, in turns. A step's cost is CPU time of
the scheduling thread, and is compared with how long a step of the tiny model takes at the same
batch, which an engine measures first. "Figures" is the time inside the calls that gather them;
"trace" the difference to the run without. The difference is given for figures, too: it is the same
up to the noise of a shared machine. The clock is virtual and advances by the model's step, so that
reports are as frequent as in operation. "Front end" is what a report costs the API server process,
which no step waits for.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.engine import prepare_environment
from benchmarks.manifest import write_output
from benchmarks.model import model_folder
from benchmarks.scheduler_overhead import ClosedLoop

_TURN_STEPS = 50
_VARIANTS = ("none", "figures", "trace")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="The cost of figures and traces.")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--queued", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--blocks", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=None)
    return parser.parse_args(argv)


def measure_step_s(args: argparse.Namespace) -> float:
    """Median seconds of a decode step of the tiny model with the whole batch."""
    from vllm import SamplingParams

    from fastserve_vllm import LLM

    llm = LLM(
        str(model_folder(args.model)),
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        max_model_len=1024,
        max_num_seqs=args.batch,
        kv_cache_memory_bytes=256 << 20,
    )
    prompts = [{"prompt_token_ids": [10 + n] * 32} for n in range(args.batch)]
    engine = llm.llm_engine
    for number, prompt in enumerate(prompts):
        parameters = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
        engine.add_request(str(number), prompt, parameters)
    seconds = []
    while engine.has_unfinished_requests():
        started = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - started)
    engine.engine_core.shutdown()
    return statistics.median(seconds)


class NoReporter:
    """Stands in for the reporter, and does nothing."""

    def __init__(self, reporter: Any) -> None:
        self.seconds = dict(reporter.seconds)

    def planned(self, plan: Any, now_s: float) -> None: ...

    def step(self, step: Any) -> None: ...

    def take(self) -> None: ...


class Meter:
    """CPU seconds of this thread inside the calls of some methods."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, owner: Any, *names: str) -> None:
        """Measure calls of an object's methods from now on."""
        for name in names:
            setattr(owner, name, self._measured(getattr(owner, name)))

    def _measured(self, call: Any) -> Any:
        def measured(*args: Any) -> Any:
            started = time.thread_time()
            try:
                return call(*args)
            finally:
                self.seconds += time.thread_time() - started

        return measured


class Sample:
    """One engine under a constant load."""

    def __init__(self, variant: str, queued: int, seed: int, step_s: float, args: Any) -> None:
        from fastserve_vllm.kv_swap.connector import find_connector
        from fastserve_vllm.testing import ModelFreeEngine, vllm_config

        self._folder = tempfile.TemporaryDirectory()
        trace = Path(self._folder.name) / "trace.jsonl"
        config = vllm_config(
            str(model_folder(args.model)),
            {"trace_file": str(trace)} if variant == "trace" else {},
            max_num_seqs=args.batch,
            enable_prefix_caching=False,
        )
        engine = ModelFreeEngine(config, num_blocks=args.blocks, step_s=lambda _: step_s)
        self.reports: list[dict[str, Any]] = []
        connector = find_connector(engine.scheduler.connector)
        if variant == "none":
            engine.scheduler.reporter = NoReporter(engine.scheduler.reporter)
            connector.statistics = engine.scheduler.reporter.take
        else:
            take = connector.statistics
            connector.statistics = lambda: self._keep(take())
        self.inside = Meter()
        if variant == "figures":
            self.inside.watch(engine.scheduler.reporter, "planned", "step")
            self.inside.watch(connector, "get_kv_connector_stats")
        self._loop = ClosedLoop(engine, args.batch + queued, seed)
        self._engine = engine
        self._trace = trace
        self.seconds: list[float] = []
        # Until the burst at the start is over.
        self.steps(min(40 * (args.batch + queued) // args.batch, 1000) + 200)
        self.seconds.clear()
        self.inside.seconds = 0.0

    def _keep(self, report: dict[str, Any] | None) -> dict[str, Any] | None:
        if report is not None:
            self.reports.append(report)
        return report

    def steps(self, count: int) -> None:
        """Run steps, timed together."""
        started = time.thread_time()
        for _ in range(count):
            self._engine.step()
            self._loop.top_up()
        self.seconds.append((time.thread_time() - started) / count)

    def close(self) -> int:
        """End it; bytes of trace written."""
        self._engine.scheduler.shutdown()
        written = sum(file.stat().st_size for file in self._trace.parent.iterdir())
        self._folder.cleanup()
        return written


def measure(queued: int, seed: int, step_s: float, args: argparse.Namespace) -> dict[str, float]:
    """Microseconds a step of every variant; they take turns."""
    samples = {variant: Sample(variant, queued, seed, step_s, args) for variant in _VARIANTS}
    gc.collect()
    gc.freeze()
    for _ in range(args.steps // _TURN_STEPS):
        for sample in samples.values():
            sample.steps(_TURN_STEPS)
    gc.unfreeze()
    times = {variant: 1e6 * statistics.fmean(s.seconds) for variant, s in samples.items()}
    reports = samples["figures"].reports
    written = {variant: sample.close() for variant, sample in samples.items()}
    return {
        **{f"{variant}_step_us": us for variant, us in times.items()},
        "figures_cost_us": 1e6 * samples["figures"].inside.seconds / args.steps,
        "figures_difference_us": _difference(samples["figures"], samples["none"]),
        "trace_cost_us": _difference(samples["trace"], samples["none"]),
        "trace_bytes": float(written["trace"]),
        "front_end_us_a_report": front_end_us(reports, args),
    }


def _difference(one: Sample, other: Sample) -> float:
    """Median of the turns' differences, microseconds: the same turns serve the same requests."""
    return 1e6 * statistics.median(a - b for a, b in zip(one.seconds, other.seconds, strict=True))


def front_end_us(reports: Sequence[dict[str, Any]], args: argparse.Namespace) -> float:
    """Microseconds that taking in a report costs the API server process."""
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

    from fastserve_vllm.kv_swap.statistics import FastServePromMetrics
    from fastserve_vllm.testing import vllm_config

    registry = CollectorRegistry()
    kinds = {
        kind: lambda kind=kind, **kwargs: kind(registry=registry, **kwargs)
        for kind in (Counter, Gauge, Histogram)
    }
    config = vllm_config(str(model_folder(args.model)), {})
    metrics = FastServePromMetrics(config, kinds, ["model_name", "engine"], {0: ["m", "0"]})
    metrics.observe(reports[0])
    started = time.thread_time()
    for report in reports:
        metrics.observe(report)
    return 1e6 * (time.thread_time() - started) / len(reports)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Every queue length and seed; shares are of the model's step."""
    step_s = measure_step_s(args)
    rows = []
    for queued in tqdm(args.queued, unit="queue"):
        seeds = [measure(queued, seed, step_s, args) for seed in args.seeds]
        figures = {key: statistics.median(seed[key] for seed in seeds) for key in seeds[0]}
        shares = {
            f"{name}_share": figures[f"{name}_cost_us"] / (1e6 * step_s)
            for name in ("figures", "trace")
        }
        rows.append({"queued": queued, **figures, **shares, "seeds": seeds})
    return {"batch": args.batch, "model_step_ms": 1000 * step_s, "rows": rows}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print a table."""
    args = parse_arguments(argv)
    prepare_environment()
    result = run(args)
    print(f"a step of the model at batch {args.batch}: {result['model_step_ms']:.2f} ms\n")
    print(
        "| queued | figures | of the step | difference | with a trace | of the step | front end |"
    )
    print("| --- " * 7 + "|")
    for row in result["rows"]:
        print(
            f"| {row['queued']} | {row['figures_cost_us']:.1f} us | {row['figures_share']:.2%} "
            f"| {row['figures_difference_us']:.1f} us "
            f"| {row['trace_cost_us']:.1f} us | {row['trace_share']:.2%} "
            f"| {row['front_end_us_a_report']:.0f} us a report |"
        )
    write_output(args, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
