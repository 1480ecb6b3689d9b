"""One point measured over HTTP: a `vllm serve` of its own, and vLLM's own benchmark client."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import alone
from benchmarks.http_client import Sent, bench_serve
from benchmarks.http_dataset import write_dataset
from benchmarks.http_metrics import read_counters
from benchmarks.http_server import Server, serving
from benchmarks.machine import Interference, SpeedProbe, processes_of_session
from benchmarks.meter import increase
from benchmarks.metrics import preemption_figures
from benchmarks.pace import held_up_share, read_report
from benchmarks.plan import Plan
from benchmarks.result import RunResult, result_of
from benchmarks.store import point_name
from benchmarks.warm_up import warm_up_requests
from benchmarks.workload import Request


@dataclass(frozen=True)
class Bench:
    """Sends phases of requests to one server; datasets and logs go to `folder`."""

    server: Server
    folder: Path
    connections: int

    def send(self, requests: Sequence[Request], phase: str, *, one_by_one: bool = False) -> Sent:
        """Send requests as a client of their own.

        Every phase has its own prompts, so none finds its prompt in the prefix cache.
        """
        dataset = self.folder / f"{phase}.jsonl"
        write_dataset(dataset, requests, prompts=phase)
        return bench_serve(
            self.server,
            dataset,
            requests,
            connections=1 if one_by_one else self.connections,
            one_by_one=one_by_one,
        )


def run_point(plan: Plan, folder: Path) -> RunResult:
    """Start a server, warm it up, and send it a plan's requests."""
    log = folder / f"{point_name(plan.system.name, plan.load, plan.seed)}.log"
    with serving(plan.shape, plan.system, log) as server:
        bench = Bench(server, folder, plan.shape.batch)
        bench.send(warm_up_requests(plan.shape.batch), f"warm-{plan.seed}")
        # Only the baseline's is needed: the reference of everybody's slowdown.
        idle = plan.alone
        if idle is None:
            sent = bench.send(alone.alone_requests(), f"alone-{plan.seed}", one_by_one=True)
            idle = alone.measured(sent.records)
        before, paced = read_counters(server.base_url), read_report(server.plugins)
        interference = Interference(processes_of_session(server.session))
        with SpeedProbe() as probe:
            sent = bench.send(plan.requests, f"load-{plan.seed}")
        machine = {**interference.figures(), **probe.figures()}
        counters = increase(read_counters(server.base_url), before)
        machine |= held_up_share(increase(read_report(server.plugins), paced))
    return result_of(
        plan,
        sent.records,
        idle,
        figures={"preemptions": preemption_figures(counters)},
        counters=counters,
        wall={
            # With these, the time to first token from sending, as the client prints it, follows.
            "client_late_mean_ms": 1000 * statistics.fmean(sent.late_s),
            "client_late_max_ms": 1000 * max(sent.late_s),
            **machine,
        },
    )
