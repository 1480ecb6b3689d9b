"""The bubble of a pipeline, on a burst of requests that are much alike."""

from benchmarks import pipeline_bubble
from benchmarks.pipeline_bubble import BURST, SETTINGS, arrivals, serve


def test_no_larger_than_stock_vllms(tiny_model):
    """Two stages in step, the same batch limit: stock vLLM's second stage has nothing to do. All
    requests are served, those whose places nearly tie included.
    """
    args = pipeline_bubble.parse_arguments(["--model", tiny_model])
    requests = arrivals(BURST, 0.0, 2, 60)
    ours, stock = (serve(name, SETTINGS[0], requests, args) for name in ("fastserve", "vllm"))
    assert ours["bubble"] < 0.8 * stock["bubble"]
