"""The bubble of a pipeline, measured on virtual stages."""

from benchmarks import pipeline_bubble
from benchmarks.pipeline_bubble import BURST, SETTINGS, arrivals, serve


def test_a_burst_of_like_requests_is_served(tiny_model):
    """Two stages in step, twice: the same bubble, though the places of many jobs nearly tie."""
    args = pipeline_bubble.parse_arguments(["--model", tiny_model])
    requests = arrivals(BURST, 0.0, 2, 60)
    once, again = (serve("fastserve", SETTINGS[0], requests, args) for _ in range(2))
    assert once == again
    assert 0 < once["bubble"] < 0.5
