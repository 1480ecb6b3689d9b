"""A page that draws traces over time; it needs nothing but a browser."""

import json
from collections.abc import Sequence
from importlib.resources import files
from statistics import median
from typing import Any

from fastserve_vllm.trace.reading import ACTIVITIES, Story, Trace


def timeline_page(traces: Sequence[Trace]) -> str:
    """The page's HTML."""
    data = {"activities": ACTIVITIES, "traces": [_drawn(trace) for trace in traces]}
    # Inside a script element, nothing may look like the element's end.
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    template = files("fastserve_vllm.trace").joinpath("page.html").read_text(encoding="utf-8")
    return template.replace("{{DATA}}", text)


def _drawn(trace: Trace) -> dict[str, Any]:
    """What the page needs of a trace; times in milliseconds since its first arrival."""
    stories = sorted(trace.stories.values(), key=lambda story: story.arrival_s)
    began_s = stories[0].arrival_s if stories else 0.0
    return {
        "title": f"policy {trace.about.get('policy', 'unknown')}",
        "facts": _facts(stories),
        "reasons": (reasons := sorted({span.reason for s in stories for span in s.spans})),
        "rows": [_row(story, began_s, reasons) for story in stories],
    }


def _row(story: Story, began_s: float, reasons: list[str]) -> dict[str, Any]:
    def ms(at_s: float) -> float:
        return round(1000 * (at_s - began_s), 2)

    return {
        "id": story.request_id,
        "outcome": story.outcome or "",
        "first": None if story.first_token_s is None else ms(story.first_token_s),
        "spans": [
            [
                ACTIVITIES.index(span.activity),
                ms(span.start_s),
                ms(span.end_s),
                span.level,
                span.blocks,
                reasons.index(span.reason),
            ]
            for span in story.spans
        ],
    }


def _facts(stories: Sequence[Story]) -> str:
    firsts = sorted(s.first_token_s - s.arrival_s for s in stories if s.first_token_s is not None)
    if not firsts:
        return f"{len(stories)} requests"
    whole_s = max(story.end_s for story in stories) - stories[0].arrival_s
    tail = firsts[min(int(0.95 * len(firsts)), len(firsts) - 1)]
    return (
        f"{len(stories)} requests in {whole_s:.2f} s; time to first token: "
        f"median {median(firsts):.3f} s, 95th percentile {tail:.3f} s"
    )
