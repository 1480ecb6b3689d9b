"""Reports on their way through vLLM to Prometheus."""

import msgspec
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from fastserve_vllm.kv_swap.statistics import FastServePromMetrics, FastServeStats
from fastserve_vllm.metrics import CATALOGUE, Kind
from fastserve_vllm.testing import vllm_config

REPORT = {
    "started": 3,
    "preemptions": {"paused,order": 2, "recomputed,host": 1},
    "jobs": {"running": 4, "queued": 1},
    "queue_wait_seconds": {"0": {0: (2, 0.001), 15: (1, 100.0)}, "1": {3: (3, 0.0225)}},
    "batch_requests": {1: (5, 10.0)},
}


@pytest.fixture(scope="module")
def config(tiny_model):
    """A configuration with the connector."""
    return vllm_config(tiny_model, {})


@pytest.fixture
def registry():
    """Metrics that no other test sees."""
    return CollectorRegistry()


@pytest.fixture
def metrics(config, registry):
    """The catalogue for two engines."""

    def bound(kind):
        return lambda **kwargs: kind(registry=registry, **kwargs)

    kinds = {kind: bound(kind) for kind in (Counter, Gauge, Histogram)}
    engines = {0: ["m", "0"], 1: ["m", "1"]}
    return FastServePromMetrics(config, kinds, ["model_name", "engine"], engines)


def labels(engine="0", **own):
    return {"model_name": "m", "engine": engine, **own}


def test_report_survives_the_way_between_processes():
    """vLLM's own encoding gives an equal report back, numbered buckets included."""
    stats = SchedulerStats(kv_connector_stats=REPORT)
    encoded = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats))
    decoded = MsgpackDecoder(EngineCoreOutputs).decode(encoded)
    arrived = decoded.scheduler_stats.kv_connector_stats
    assert msgspec.to_builtins(arrived) == msgspec.to_builtins(
        msgspec.msgpack.decode(msgspec.msgpack.encode(REPORT))
    )
    assert list(arrived["batch_requests"]) == [1]


def test_counters_add_up_and_gauges_follow(metrics, registry):
    """Two reports: increases add up, values replace."""
    metrics.observe(REPORT, 0)
    metrics.observe({"started": 2, "jobs": {"running": 1}}, 0)
    assert registry.get_sample_value("vllm:fastserve_started_total", labels()) == 5
    assert registry.get_sample_value("vllm:fastserve_jobs", labels(state="running")) == 1
    both = labels(mode="paused", cause="order")
    assert registry.get_sample_value("vllm:fastserve_preemptions_total", both) == 2


def test_engines_are_apart(metrics, registry):
    """An engine's report moves its own series only."""
    metrics.observe(REPORT, 1)
    assert registry.get_sample_value("vllm:fastserve_started_total", labels("1")) == 3
    assert registry.get_sample_value("vllm:fastserve_started_total", labels("0")) == 0


def test_histogram_keeps_buckets_and_sum(metrics, registry):
    """Each observation is in its bucket, beyond the last bound included; the sum is exact."""
    metrics.observe(REPORT, 0)
    name = "vllm:fastserve_queue_wait_seconds"

    def below(bound, level):
        return registry.get_sample_value(f"{name}_bucket", labels(level=level, le=bound))

    assert [below(b, "0") for b in ("0.001", "60.0", "+Inf")] == [2, 2, 3]
    assert [below(b, "1") for b in ("0.005", "0.01")] == [0, 3]
    assert registry.get_sample_value(f"{name}_sum", labels(level="0")) == pytest.approx(100.001)
    assert registry.get_sample_value(f"{name}_count", labels(level="1")) == 3


def test_rounding_does_not_leave_the_bucket(metrics, registry):
    """The mean of equal observations on a bound may be above it by rounding."""
    metrics.observe({"step_seconds": {6: (3, 0.1 + 0.1 + 0.1)}}, 0)
    found = registry.get_sample_value("vllm:fastserve_step_seconds_bucket", labels(le="0.1"))
    assert found == 3


def test_counters_exist_before_anything_happens(metrics, registry):
    """A rate would miss what a series shows when it appears."""
    for metric in CATALOGUE:
        if metric.kind is Kind.COUNTER and not metric.labels:
            assert registry.get_sample_value(metric.sample_name, labels()) == 0, metric.name
    for reason in ("tokens", "memory", "host_memory"):
        assert (
            registry.get_sample_value("vllm:fastserve_declined_total", labels(reason=reason)) == 0
        )


def test_log_line_holds_what_moved():
    """vLLM's periodic log shows totals and means, and no zeros."""
    stats = FastServeStats(data={**REPORT, "promotions": 0})
    assert stats.reduce() == {
        "started": 3,
        "preemptions": 3,
        "jobs": 5,
        "queue_wait_seconds": round(100.0235 / 6, 6),
        "batch_requests": 2.0,
    }
