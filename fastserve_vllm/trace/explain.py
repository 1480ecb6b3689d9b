"""Where the time of one request went, in words."""

from collections import Counter

from fastserve_vllm.trace.reading import RUNNING, Span, Story

WORDS = {
    "queued": "queued: no KV cache, waiting for a turn",
    "blocked": "not ready: a grammar, input or remote KV cache",
    "prefill": "running: computing the prompt",
    "decode": "running: generating",
    "recompute": "running: recomputing what was given up",
    "paused": "paused: KV cache kept on the device",
    "swapping_out": "swapping: KV cache on its way to the host",
    "swapped": "swapped: KV cache on the host",
    "swapping_in": "swapping: KV cache on its way back",
}


def shares(story: Story) -> list[tuple[str, float, float]]:
    """(in words, seconds, share of the whole) of what it did, longest first."""
    whole_s = max(story.end_s - story.arrival_s, 1e-9)
    rows = [(WORDS[name], s, s / whole_s) for name, s in story.seconds().items() if s > 0]
    return sorted(rows, key=lambda row: -row[1])


def facts(story: Story) -> list[tuple[str, str]]:
    """(name, value) of what else there is to know."""
    waits = _waits(story)
    longest_s = max((end - start for start, end in waits), default=0.0)
    first_s = story.first_token_s
    levels = [span.level for span in story.spans]
    reasons = Counter(
        span.reason
        for before, span in zip(story.spans, story.spans[1:], strict=False)
        if before.activity in RUNNING and span.activity not in RUNNING
    )
    ends = ", ".join(f"{times} x {reason}" for reason, times in reasons.most_common())
    return [
        ("ended", story.outcome or "not within the trace"),
        ("total", f"{story.end_s - story.arrival_s:.3f} s"),
        ("first token", "none" if first_s is None else f"after {first_s - story.arrival_s:.3f} s"),
        ("entry level", str(levels[0])),
        ("lowest level", str(max(levels))),
        ("turns", str(sum(span.reason == "turn" for span in story.spans))),
        ("turns cut short", ends or "none"),
        ("longest wait for a turn", f"{longest_s:.3f} s"),
    ]


def _waits(story: Story) -> list[tuple[float, float]]:
    """From the end of each turn, or arrival, to the next turn."""
    waits: list[tuple[float, float]] = []
    start_s: float | None = None
    for span in story.spans:
        if span.activity in RUNNING:
            if start_s is not None:
                waits.append((start_s, span.start_s))
            start_s = None
        elif start_s is None:
            start_s = span.start_s
    if start_s is not None:
        waits.append((start_s, story.end_s))
    return waits


def merged(story: Story) -> list[Span]:
    """Its spans, those of the same kind and level that touch made one."""
    spans: list[Span] = []
    for span in story.spans:
        last = spans[-1] if spans else None
        if last and (last.activity, last.level) == (span.activity, span.level):
            spans[-1] = Span(
                last.activity,
                last.level,
                last.reason,
                last.blocks,
                last.step,
                last.start_s,
                span.end_s,
            )
        else:
            spans.append(span)
    return spans
