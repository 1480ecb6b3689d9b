"""A trace in Chrome's trace event format, for Perfetto and chrome://tracing."""

from typing import Any

from fastserve_vllm.trace.reading import Trace


def chrome_trace(trace: Trace) -> dict[str, Any]:
    """One thread a request, one complete event a span; times in microseconds since the first."""
    began_s = min((story.arrival_s for story in trace.stories.values()), default=0.0)
    events: list[dict[str, Any]] = [
        _name("process_name", 1, 0, f"FastServe, policy {trace.about.get('policy', '?')}")
    ]
    for thread, story in enumerate(trace.stories.values(), 1):
        events.append(_name("thread_name", 1, thread, story.request_id))
        events += [
            {
                "name": span.activity,
                "cat": "request",
                "ph": "X",
                "pid": 1,
                "tid": thread,
                "ts": round(1e6 * (span.start_s - began_s)),
                "dur": round(1e6 * (span.end_s - span.start_s)),
                "args": {
                    "level": span.level,
                    "reason": span.reason,
                    "blocks": span.blocks,
                    "step": span.step,
                },
            }
            for span in story.spans
        ]
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": trace.about}


def _name(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
