"""Exported figures against a count by hand, on a run that is the same every time."""

from collections import Counter
from itertools import pairwise

import pytest

from fastserve_vllm.kv_swap.connector import FastServeConnector, find_connector
from fastserve_vllm.kv_swap.statistics import FastServeStats
from fastserve_vllm.metrics import BY_NAME, Kind
from fastserve_vllm.testing import ModelFreeEngine, vllm_config
from fastserve_vllm.trace.reading import read_trace

STEP_S = 0.004


def engine(model, fastserve, *, num_blocks=4096, **args):
    """An engine without a model, and the sum of all its reports."""
    config = vllm_config(model, fastserve, enable_prefix_caching=False, **args)
    engine = ModelFreeEngine(config, num_blocks=num_blocks, step_s=lambda _: STEP_S)
    connector: FastServeConnector = find_connector(engine.scheduler.connector)
    take, total = connector.statistics, FastServeStats()

    def taking():
        report = take()
        if report is not None:
            total.aggregate(FastServeStats(data=report))
        return report

    connector.statistics = taking
    return engine, total


@pytest.fixture
def three_requests(tiny_model):
    """Three requests of ten prompt tokens and six answers in two places.

    A quantum of 10 ms lasts for three steps. Steps 1 to 3 run A and B, which are demoted then; 4 to
    6 run C, and A, which is first of level 1 and ends; 7 to 9 run B and the demoted C.
    """
    fastserve = {
        "policy": "mlfq",
        "base_quantum_s": 0.01,
        "quantum_ratio": 2.0,
        "num_levels": 3,
        "swap_mode": "recompute",
    }
    run, total = engine(tiny_model, fastserve, max_num_seqs=2)
    for name in "ABC":
        run.add(name, 10, 6)
    assert run.drain() == 9
    return total.data


EXPECTED = {
    "started": 4,
    "joins": {"0": 3, "1": 0, "2": 0},
    "demotions": {"0": 3, "1": 0, "2": 0},
    "promotions": 0,
    "recomputed_tokens": 0,
    "batch_tokens": {"prefill": 30, "decode": 15},
    "declined": {"tokens": 0, "adapters": 0, "memory": 0},
    "jobs": dict.fromkeys(BY_NAME["jobs"].labels[0].values, 0),
    "level_jobs": {"0": 0, "1": 0, "2": 0},
    "batch_limit": 2,
    "quantum_seconds": {"0": 0.01, "1": 0.02},
    "starvation_limit_seconds": 6.0,
    "device_blocks": {"free": 4095, "held": 0, "leaving": 0},
    "longest_wait_seconds": {"0": 0.0, "1": 0.0, "2": 0.0},
}


def test_counters_and_gauges(three_requests):
    """What happened and what is, figure by figure."""
    assert {name: three_requests[name] for name in EXPECTED} == EXPECTED


def test_one_preemption(three_requests):
    """B alone lost its place, to C, and kept its KV cache."""
    happened = {key: n for key, n in three_requests["preemptions"].items() if n}
    assert happened == {"paused,order": 1}


def observations(name, buckets):
    """Counts and sums by upper bound."""
    bounds = (*BY_NAME[name].buckets, float("inf"))
    return {bounds[bucket]: (n, pytest.approx(s)) for bucket, (n, s) in buckets.items()}


def test_histograms(three_requests):
    """Nine steps of 4 ms with two requests each; C and B waited for three steps, A not at all."""
    assert observations("step_seconds", three_requests["step_seconds"]) == {0.005: (9, 0.036)}
    assert observations("batch_requests", three_requests["batch_requests"]) == {2.0: (9, 18)}
    waits = three_requests["queue_wait_seconds"]
    assert observations("queue_wait_seconds", waits["0"]) == {0.001: (2, 0.0), 0.02: (1, 0.012)}
    assert observations("queue_wait_seconds", waits["1"]) == {0.02: (1, 0.012)}
    assert sum(n for n, _ in three_requests["prediction_ratio"].values()) == 9


@pytest.mark.parametrize("mode", ["proactive", "reactive", "recompute"])
def test_figures_equal_the_trace(tiny_model, tmp_path, mode):
    """Where memory is short, counters equal what the trace tells of the same run."""
    path = tmp_path / "trace.jsonl"
    fastserve = {"base_quantum_s": STEP_S, "swap_mode": mode, "trace_file": str(path)}
    run, total = engine(
        tiny_model,
        fastserve,
        num_blocks=60,
        max_num_seqs=6,
        max_num_batched_tokens=512,
        max_model_len=512,
    )
    for number in range(24):
        run.add(f"r{number}", 20 + 13 * number % 300, 5 + 29 * number % 150)
        run.step()
    run.drain()
    run.scheduler.shutdown()
    told = read_trace(path)
    figures = total.data
    spans = [story.spans for story in told.stories.values()]
    running = ("prefill", "decode", "recompute")
    cut_short = Counter(
        after.reason
        for story in spans
        for before, after in pairwise(story)
        if before.activity in running and after.activity not in running
    )
    assert cut_short.total() == sum(figures["preemptions"].values()) > 0
    reasons = Counter(span.reason for story in spans for span in story)
    assert reasons["turn"] == figures["started"]
    assert reasons["quantum used up"] == sum(figures["demotions"].values()) > 0
    joined = Counter(str(story[0].level) for story in spans)
    assert joined == Counter({k: n for k, n in figures["joins"].items() if n})

    def preempted(mode):
        pairs = figures["preemptions"].items()
        return sum(times for pair, times in pairs if pair.startswith(f"{mode},"))

    assert cut_short["others first"] == preempted("paused")
    assert cut_short["leaves for others"] == preempted("swapped_out")
    if mode == "recompute":
        assert figures["recomputed_tokens"] > 0
        assert cut_short["memory short, given up"] == preempted("recomputed")
    else:
        left = ("leaves for others", "memory short, copied", "blocks taken, copied")
        assert sum(reasons[reason] for reason in left) == figures["swapped_out"] > 0


@pytest.mark.parametrize(
    "overlap",
    [{"async_scheduling": True}, {"pipeline_parallel_size": 2}],
    ids=["async", "pipeline"],
)
def test_no_counter_falls(tiny_model, overlap):
    """Prometheus refuses it, and vLLM's server ends. Steps overlap here, and requests whose output
    is in flight leave the device.
    """
    args = {"max_num_seqs": 8, "max_model_len": 512, "enable_prefix_caching": False, **overlap}
    config = vllm_config(tiny_model, {"base_quantum_s": 0.002}, **args)
    run = ModelFreeEngine(config, num_blocks=25, step_s=lambda _: 0.3, copy_steps=1)
    connector, reports = find_connector(run.scheduler.connector), []
    take = connector.statistics
    connector.statistics = lambda: reports.append(take()) or reports[-1]
    for number in range(200):
        if len(run.scheduler.requests) < 40:
            run.add(f"r{number}", 3 + 37 * number % 290, (1, 5, 20, 60)[number % 4])
        run.step()
    assert run.scheduler.planner.counters.swapped_out > 20
    figures = [(BY_NAME[name], f) for r in reports if r is not None for name, f in r.items()]
    counters = [(metric, figure) for metric, figure in figures if metric.kind is Kind.COUNTER]
    assert [(m.name, key) for m, f in counters for key, n in m.series(f) if n < 0] == []
