"""Latency against load over real HTTP, in wall time, with vLLM's own benchmark client.

    python -m benchmarks.http_load --trace TRACE.csv --requests 400 --batch 16 --load 1.2 \
        --systems vllm-fcfs fastserve --seeds 0 1 2 \
        --output benchmarks/results/http_sharegpt_b16.json

Only one server runs at a time. Systems alternate from seed to seed, so that a machine that grows
slower or faster meanwhile favours none of them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.cli import (
    arriving_at,
    configuration,
    engine_shape,
    finish,
    result_document,
    sampled_workloads,
    with_baseline,
    workload_arguments,
)
from benchmarks.engine import EngineShape
from benchmarks.http_client import Sent, bench_serve
from benchmarks.http_dataset import write_dataset
from benchmarks.http_server import Server, serving, warm_up
from benchmarks.metrics import figures_of, requests_per_s
from benchmarks.records import digest_of_run
from benchmarks.report import RunResult
from benchmarks.systems import BASELINE, check_servable, system_named
from benchmarks.workload import Request, all_present

# Requests sent one at a time to learn what a request costs alone.
_ALONE_REQUESTS = 8


@dataclass(frozen=True)
class Bench:
    """Everything that stays the same over the runs."""

    args: argparse.Namespace
    shape: EngineShape
    workloads: dict[int, list[Request]]
    folder: Path

    def send(
        self,
        server: Server,
        requests: Sequence[Request],
        phase: str,
        max_concurrency: int | None = None,
    ) -> Sent:
        """Write a phase's dataset and send it.

        Every phase has its own prompts, so none finds its prompt in the prefix cache.
        """
        dataset = self.folder / f"{phase}.jsonl"
        write_dataset(dataset, requests, prompts=phase)
        return bench_serve(server, dataset, requests, max_concurrency)

    def server_log(self, name: str) -> Path:
        """Where a server's output goes."""
        return self.folder / f"{name}.log"


@dataclass(frozen=True)
class Reference:
    """What the baseline can do: requests per second by seed, and a request's latency alone."""

    capacities: dict[int, float]
    ttft_s: float
    token_s: float

    def alone_s(self, prompt_tokens: int, output_tokens: int) -> float:
        """Latency of a request on an idle server; the prompt's length is not looked at."""
        return self.ttft_s + (output_tokens - 1) * self.token_s


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Latency against load over HTTP.")
    workload_arguments(parser)
    parser.add_argument("--load", type=float, default=1.2, help="arrival rate over capacity")
    parser.add_argument("--logs", type=Path, help="folder to keep datasets and server logs in")
    return parser.parse_args(argv)


def measure_reference(bench: Bench) -> Reference:
    """Measure the baseline: alone, then with all requests present at the start."""
    with serving(bench.shape, system_named(BASELINE), bench.server_log("reference")) as server:
        warm_up(server, bench.shape.batch)
        first = next(iter(bench.workloads.values()))[:_ALONE_REQUESTS]
        alone = bench.send(server, all_present(first), "alone", max_concurrency=1).records
        capacities = {
            seed: requests_per_s(
                bench.send(server, all_present(requests), f"capacity-{seed}").records
            )
            for seed, requests in bench.workloads.items()
        }
    # Neither figure is thrown off by a client that is held up and gets many tokens at once.
    ttft_s = min(record.ttft_s for record in alone)
    token_s = statistics.median(record.normalized_s for record in alone)
    return Reference(capacities, ttft_s, token_s)


def measure_load(bench: Bench, system: str, seed: int, reference: Reference) -> RunResult:
    """Start a system's server and send it one seed's workload at the load."""
    load = bench.args.load
    rate_rps = load * reference.capacities[seed]
    requests = arriving_at(bench.workloads[seed], rate_rps, seed, bench.args)
    log = bench.server_log(f"{system}-{seed}")
    with serving(bench.shape, system_named(system), log) as server:
        warm_up(server, bench.shape.batch)
        sent = bench.send(server, requests, f"load-{seed}")
    return RunResult(
        system=system,
        load=load,
        seed=seed,
        rate_rps=rate_rps,
        figures=figures_of(sent.records, reference.alone_s),
        output_digest=digest_of_run(sent.records),
        request_digests={record.id: record.output_digest for record in sent.records},
        wall={
            # With these, the time to first token from sending, as the client prints it, follows.
            "client_late_mean_ms": 1000 * statistics.fmean(sent.late_s),
            "client_late_max_ms": 1000 * max(sent.late_s),
        },
    )


def alternating(systems: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Every system with every seed, the order of the systems turned around each time."""
    for number, seed in enumerate(seeds):
        for system in systems if number % 2 == 0 else reversed(systems):
            yield system, seed


def measure(bench: Bench, systems: Sequence[str]) -> tuple[Reference, list[RunResult]]:
    """Measure the reference, then every system with every seed."""
    plan = list(alternating(systems, list(bench.workloads)))
    runs = []
    with tqdm(total=1 + len(plan), unit="server") as progress:
        progress.set_description("capacity")
        reference = measure_reference(bench)
        progress.update()
        for system, seed in plan:
            progress.set_description(f"{system} seed {seed}")
            runs.append(measure_load(bench, system, seed, reference))
            progress.update()
    return reference, runs


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 1 when systems generate different texts."""
    args = parse_arguments(argv)
    systems = with_baseline(args.systems)
    for system in systems:
        check_servable(system)
    workloads = sampled_workloads(args.trace, args.requests, args.seeds, args.trace_arrivals)
    shape = engine_shape(args, workloads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.logs or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(args, shape, workloads, folder)
        reference, runs = measure(bench, systems)
    extra = {
        "capacity_rps": reference.capacities,
        "alone_ms": {"ttft": 1000 * reference.ttft_s, "token": 1000 * reference.token_s},
    }
    rates = ", ".join(f"{rate:.2f}" for rate in reference.capacities.values())
    late_ms = max(run.wall["client_late_max_ms"] for run in runs)
    print(f"capacity of {BASELINE}: {rates} /s; requests were sent up to {late_ms:.0f} ms late\n")
    document = result_document(runs, configuration(args, shape, "wall"), extra)
    return finish(document, runs, args.output)


if __name__ == "__main__":
    sys.exit(main())
