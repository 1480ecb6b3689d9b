from __future__ import annotations

import pytest

from benchmarks.alone import Alone
from benchmarks.metrics import figures_of, preemption_figures, requests_per_s, sustained_rate
from benchmarks.records import RequestRecord, digest_of_run, digest_of_tokens


def record(arrival_s=0.0, times_s=(1.0,), output=None, name="0", prompt=4, digest="x"):
    output = len(times_s) if output is None else output
    return RequestRecord(name, arrival_s, prompt, output, tuple(times_s), digest)


def figures(*records):
    return figures_of(records, Alone(first_s=0.1, prompt_token_s=0.0, token_s=0.1))


def test_latencies_of_one_request():
    """Arrives at 1, tokens at 2, 2.5 and 4: every figure by hand."""
    result = figures(record(1.0, (2.0, 2.5, 4.0)))
    assert result["ttft_ms"]["mean"] == pytest.approx(1000)
    assert result["tpot_ms"]["mean"] == pytest.approx(1000)
    assert result["itl_ms"]["mean"] == pytest.approx(1000)
    assert result["longest_gap_ms"]["p99"] == pytest.approx(1500)
    assert result["e2e_ms"]["p50"] == pytest.approx(3000)
    assert result["normalized_ms"]["mean"] == pytest.approx(1000)


def test_throughput_counts_from_the_first_arrival_to_the_last_token():
    """Two requests, five tokens, four seconds."""
    result = figures(record(1.0, (2.0, 3.0)), record(2.0, (3.0, 4.0, 5.0)))
    assert result["duration_s"] == pytest.approx(4.0)
    assert result["requests_per_s"] == pytest.approx(0.5)
    assert result["output_tokens_per_s"] == pytest.approx(1.25)


def test_single_tokens_have_no_gaps():
    """Requests of one token do not count as having no wait between tokens."""
    result = figures(record(0.0, (1.0,)), record(0.0, (1.0, 3.0)))
    assert result["longest_gap_ms"]["mean"] == pytest.approx(2000)
    assert figures(record(0.0, (1.0,)))["tpot_ms"] is None


def test_percentiles_interpolate():
    """P50 of 1, 2, 3 and 4 seconds is 2.5."""
    result = figures(*(record(0.0, (float(n),)) for n in (1, 2, 3, 4)))
    assert result["ttft_ms"]["p50"] == pytest.approx(2500)


@pytest.mark.parametrize(
    ("tokens", "bucket"),
    [
        (1, "1-10"),
        (10, "1-10"),
        (11, "11-100"),
        (100, "11-100"),
        (101, "101-500"),
        (500, "101-500"),
        (501, "500+"),
    ],
)
def test_slowdown_buckets(tokens, bucket):
    """A request counts in the bucket of its output length, against its latency alone."""
    result = figures(record(0.0, (0.2 * tokens,), output=tokens))["slowdown"]
    assert result[bucket]["requests"] == 1
    assert result[bucket]["mean"] == pytest.approx(2.0)
    assert sum(entry["requests"] for entry in result.values()) == 1


def test_normalized_latency_counts_tokens_not_chunks():
    """Two chunks may carry four tokens."""
    assert figures(record(0.0, (1.0, 2.0), output=4))["normalized_ms"]["mean"] == 500


def test_capacity_is_requests_over_duration():
    """Three requests in six seconds."""
    assert requests_per_s([record(0.0, (float(n),)) for n in (2, 4, 6)]) == pytest.approx(0.5)


def test_sustained_rate_interpolates_the_logarithm():
    """From 1 ms at rate 10 to 100 ms at rate 20, 10 ms lies half way."""
    assert sustained_rate([20.0, 10.0], [100.0, 1.0], 10.0) == pytest.approx(15.0)


def test_sustained_rate_outside_the_points_is_unknown():
    """Nothing is extrapolated."""
    assert sustained_rate([10.0, 20.0], [1.0, 2.0], 5.0) is None
    assert sustained_rate([10.0, 20.0], [6.0, 9.0], 5.0) is None


def test_records_need_output():
    """A request without a token has no latency."""
    with pytest.raises(ValueError, match="no output"):
        record(times_s=())


def test_run_digest_ignores_the_order_of_finishing():
    """The same outputs give the same digest, other outputs another."""
    a, b = (record(name=n, digest=digest_of_tokens([1, int(n)])) for n in "12")
    assert digest_of_run([a, b]) == digest_of_run([b, a])
    assert digest_of_run([a]) != digest_of_run([b])


def test_quantiles_draw_the_distribution():
    """From the smallest to the largest, in milliseconds, the median in the middle."""
    result = figures(*(record(0.0, (float(n),)) for n in (1, 2, 3)))["quantiles"]
    assert len(result["ttft_ms"]) == 101
    assert [result["ttft_ms"][n] for n in (0, 50, 100)] == [1000, 2000, 3000]
    assert "longest_gap_ms" not in result


@pytest.mark.parametrize(
    ("times_s", "met"),
    [
        ((5.0, 5.4), (True, True, True)),
        ((5.0, 5.6), (False, True, True)),
        ((6.0, 6.1), (False, True, True)),
        ((5.0, 6.5), (False, False, True)),
        ((21.0, 21.1), (False, False, False)),
        ((1.0,), (True, True, True)),
    ],
)
def test_targets_are_met_on_both_sides(times_s, met):
    """Time to first token and time a token, in steps of 0.1 s."""
    result = figures(record(0.0, times_s))["within_target"]
    assert tuple(result.values()) == met


def test_preemptions_are_told_apart_in_process_and_over_http():
    """The scheduler's own counter and the server's metric name the same kinds."""
    own = {"preempted": {"paused,order": 3, "paused,host": 1, "recomputed,memory": 2}}
    served = {"preemptions": {"order, paused": 3.0, "host, paused": 1.0, "memory, recomputed": 2.0}}
    for counters in (own, served):
        figures = preemption_figures(counters)
        assert (figures["paused"], figures["recomputed"]) == (4, 2)
