"""State changes as OpenTelemetry events."""

import time

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fastserve_vllm.spans import SPAN
from fastserve_vllm.testing import ModelFreeEngine, vllm_config

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def exporter(monkeypatch):
    """What an engine's tracer exports."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("opentelemetry.trace.get_tracer", provider.get_tracer)
    return exporter


@pytest.fixture
def engine(tiny_model, exporter):
    """An engine of a server that was started with --otlp-traces-endpoint."""
    config = vllm_config(tiny_model, {"policy": "fcfs"}, max_num_seqs=1)
    config.observability_config.otlp_traces_endpoint = "http://127.0.0.1:1"
    return ModelFreeEngine(config)


def test_request_has_a_span(engine, exporter):
    """Its state changes are events, in the caller's trace, at the time of day."""
    before_s = time.time()
    engine.add("first", 10, 3, trace_headers={"traceparent": CALLER})
    engine.add("second", 10, 1)
    engine.drain()
    first, second = exporter.get_finished_spans()
    assert {first.name, second.name} == {SPAN}
    assert f"{first.context.trace_id:032x}" == CALLER.split("-")[1]
    assert f"{first.parent.span_id:016x}" == CALLER.split("-")[2]
    assert second.parent is None
    assert first.attributes["gen_ai.request.id"] == "first"
    assert [event.name for event in first.events] == ["queued", "running", "running", "finished"]
    assert first.events[1].attributes["reason"] == "turn"
    assert abs(first.start_time / 1e9 - before_s) < 60
    assert first.end_time - first.start_time == pytest.approx(3e6, abs=1000)


def test_living_requests_end_with_the_engine(engine, exporter):
    """A server that stops exports what it has."""
    engine.add("cut", 10, 100)
    engine.step()
    engine.scheduler.shutdown()
    assert len(exporter.get_finished_spans()) == 1


def test_off_without_an_endpoint(tiny_model):
    """Nobody pays for tracing that is off."""
    planner = ModelFreeEngine(vllm_config(tiny_model, {})).scheduler.planner
    assert type(planner).__name__ == "StepPlanner"
