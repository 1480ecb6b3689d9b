from __future__ import annotations

import pytest

from benchmarks.http_client import sent_of
from benchmarks.http_metrics import counters_of
from benchmarks.workload import Request

REQUESTS = [Request("0", 0.5, 9, 3), Request("1", 1.5, 7, 1)]


def result(**changes):
    """A detailed result of `vllm bench serve`: a pilot, then a request sent 0.2 s late."""
    return {
        "errors": ["", "", ""],
        "failed": 0,
        "input_lens": [16, 9, 7],
        "output_lens": [32, 3, 1],
        "start_times": [99.0, 100.5, 101.7],
        "ttfts": [0.5, 0.1, 0.4],
        "itls": [[0.1], [0.2, 0.3], []],
        "generated_texts": ["pilot", "abc", "d"],
        **changes,
    }


def test_latency_counts_from_when_a_request_was_due():
    """A late client does not make latencies look shorter."""
    sent = sent_of(result(), REQUESTS, from_due=True)
    assert [record.ttft_s for record in sent.records] == pytest.approx([0.1, 0.6])
    assert [record.e2e_s for record in sent.records] == pytest.approx([0.6, 0.6])
    assert sent.late_s == pytest.approx([0.0, 0.2])


def test_latency_can_count_from_sending():
    """With limited concurrency, waiting in the client is not the server's."""
    sent = sent_of(result(), REQUESTS, from_due=False)
    assert [record.ttft_s for record in sent.records] == pytest.approx([0.1, 0.4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"failed": 1, "errors": ["", "", "gone"]}, "gone"),
        ({"input_lens": [16, 9, 8]}, "prompt length"),
        ({"output_lens": [32, 2, 1]}, "output length"),
    ],
)
def test_a_result_that_is_not_the_workload_is_refused(changes, message):
    """Failed requests and other token counts would make figures of something else."""
    with pytest.raises(RuntimeError, match=message):
        sent_of(result(**changes), REQUESTS, from_due=True)


def test_counters_of_a_server():
    """FastServe's counters and vLLM's preemptions, by label where there is one of their own."""
    common = 'engine="0",model_name="m"'
    text = f"""# HELP vllm:num_preemptions_total Preemptions.
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{{{common}}} 3.0
# HELP vllm:fastserve_paused_total Paused.
# TYPE vllm:fastserve_paused_total counter
vllm:fastserve_paused_total{{{common}}} 7.0
# HELP vllm:fastserve_declined_total Declined.
# TYPE vllm:fastserve_declined_total counter
vllm:fastserve_declined_total{{{common},reason="slots"}} 5.0
# HELP vllm:fastserve_jobs Live requests.
# TYPE vllm:fastserve_jobs gauge
vllm:fastserve_jobs{{{common},state="queued"}} 9.0
# HELP vllm:prompt_tokens_total Prompt tokens.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{{{common}}} 11.0
"""
    assert counters_of(text) == {"vllm_preemptions": 3.0, "paused": 7.0, "declined": {"slots": 5.0}}
