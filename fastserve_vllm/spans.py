"""State changes as OpenTelemetry events, where vLLM's tracing is on.

vLLM makes its span of a request in the API server's process, in one call once the request has
finished; the engine's process cannot add events to it. But that process has vLLM's tracer and the
caller's trace context. So each request gets a span of its own here, in the same trace as vLLM's.
"""

import time
from collections.abc import Callable
from typing import Any

from vllm.tracing import extract_trace_context

from fastserve_vllm.trace.trace_file import Event

SPAN = "fastserve_request"


class SpanSink:
    """A sink of a `RecordedPlanner`. The SDK keeps a span's last 128 events.

    Args:
        tracer: makes the spans.
        clock: that of the events; spans have the time of day.
    """

    def __init__(self, tracer: Any, clock: Callable[[], float]) -> None:
        self._tracer = tracer
        self._ahead_s = time.time() - clock()
        self._open: dict[str, Any] = {}

    def add(self, event: Event, handle: Any) -> None:
        """Note an event of vLLM's request `handle`."""
        at_ns = int(1e9 * (event.at_s + self._ahead_s))
        span = self._open.get(event.request_id)
        if span is None:
            span = self._open[event.request_id] = self._tracer.start_span(
                SPAN,
                context=extract_trace_context(handle.trace_headers),
                start_time=at_ns,
                attributes={"gen_ai.request.id": event.request_id},
            )
        about = {
            "level": event.level,
            "reason": event.reason,
            "blocks": event.blocks,
            "step": event.step,
        }
        span.add_event(event.state, about, at_ns)
        if event.state == "finished":
            del self._open[event.request_id]
            span.end(at_ns)

    def step(self, now_s: float) -> None:
        """The SDK sends what has ended by itself."""

    def flush(self) -> None:
        """As `step`."""

    def close(self) -> None:
        """End the spans of requests that live on."""
        for span in self._open.values():
            span.end()
        self._open.clear()
