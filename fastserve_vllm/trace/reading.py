"""Reads a trace back: what every request did, and when."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastserve_vllm.trace.trace_file import BACKUPS

ACTIVITIES = (
    "blocked",
    "queued",
    "prefill",
    "decode",
    "recompute",
    "paused",
    "swapping_out",
    "swapped",
    "swapping_in",
)
"""What a request can be doing; `running` is split by what is computed."""
RUNNING = ("prefill", "decode", "recompute")
_LOSSES = ("memory short, given up", "blocks taken")


class TraceError(ValueError):
    """A file that is no trace, or a request that is not in it."""


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of time in which a request did one thing, at one level.

    Attributes:
        activity: one of `ACTIVITIES`.
        level: the queue level.
        reason: why it began.
        blocks: KV blocks on the device at its beginning.
        step: the step it began with.
        start_s: when it began.
        end_s: when it ended, or the trace did.
    """

    activity: str
    level: int
    reason: str
    blocks: int
    step: int
    start_s: float
    end_s: float


@dataclass(slots=True)
class Story:
    """All that a trace tells of one request.

    Attributes:
        request_id: vLLM's id.
        spans: without gaps, in order.
        first_token_s: when its prompt had been computed for the first time; None: not yet.
        outcome: why it ended; None: it had not when the trace did.
    """

    request_id: str
    spans: list[Span] = field(default_factory=list)
    first_token_s: float | None = None
    outcome: str | None = None

    @property
    def arrival_s(self) -> float:
        """When it came."""
        return self.spans[0].start_s

    @property
    def end_s(self) -> float:
        """When it ended, or the trace did."""
        return self.spans[-1].end_s

    def seconds(self) -> dict[str, float]:
        """How long it did what."""
        totals = dict.fromkeys(ACTIVITIES, 0.0)
        for span in self.spans:
            totals[span.activity] += span.end_s - span.start_s
        return totals


@dataclass(slots=True)
class Trace:
    """One run of an engine.

    Attributes:
        about: the header: policy, batch limit and the like.
        stories: by request id, in the order of arrival.
    """

    about: dict[str, Any]
    stories: dict[str, Story] = field(default_factory=dict)

    def find(self, request_id: str) -> Story:
        """The request with that id; a part of it will do, if it is in no other.

        Raises:
            TraceError: there is none, or several.
        """
        if request_id in self.stories:
            return self.stories[request_id]
        found = [story for name, story in self.stories.items() if request_id in name]
        if len(found) == 1:
            return found[0]
        if not found:
            raise TraceError(f"no request {request_id!r} in this trace")
        names = ", ".join(story.request_id for story in found[:5])
        raise TraceError(f"{len(found)} requests are called like {request_id!r}: {names} ...")


def read_trace(path: Path) -> Trace:
    """The last run in a trace file and the older files that belong to it.

    Raises:
        TraceError: it is no trace.
        OSError: it cannot be read.
    """
    header: dict[str, Any] | None = None
    builder = _Builder()
    for line in _lines(path):
        if "trace" in line:
            if header is None or header.get("run") != line.get("run"):
                header, builder = line, _Builder()
        elif header is None:
            raise TraceError(f"{path} does not begin like a trace of FastServe's")
        else:
            builder.take(line)
    if header is None:
        raise TraceError(f"{path} holds no trace")
    return Trace(header, builder.close())


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    older = [Path(f"{path}.{number}") for number in range(BACKUPS, 0, -1)]
    for part in [*(file for file in older if file.exists()), path]:
        with part.open(encoding="utf-8") as lines:
            for number, text in enumerate(lines, 1):
                yield _parse(text, part, number)


def _parse(text: str, part: Path, number: int) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except json.JSONDecodeError:
        line = None
    if not isinstance(line, dict) or not ("trace" in line or {"at_s", "id", "state"} <= {*line}):
        raise TraceError(f"{part}:{number} is not a line of a trace: {text[:80]!r}")
    return line


class _Builder:
    """Turns events into spans."""

    def __init__(self) -> None:
        self._stories: dict[str, Story] = {}
        # The event with which a request's last span began, and what it does since.
        self._open: dict[str, tuple[dict[str, Any], str]] = {}
        self._lost: set[str] = set()
        self._last_s = 0.0

    def take(self, event: dict[str, Any]) -> None:
        """The next event."""
        self._last_s = max(self._last_s, event["at_s"])
        name = event["id"]
        story = self._stories.get(name)
        if story is None:
            story = self._stories[name] = Story(name)
        self._end(story, event["at_s"])
        if event["state"] == "finished":
            story.outcome = event["reason"]
            ended = self._open.pop(name, None)
            if story.first_token_s is None and ended is not None and ended[1] in RUNNING:
                story.first_token_s = event["at_s"]
            return
        if event["reason"] in _LOSSES:
            self._lost.add(name)
        self._open[name] = (event, self._activity(story, event))

    def close(self) -> dict[str, Story]:
        """All requests of which there is anything to tell."""
        for name in list(self._open):
            self._end(self._stories[name], self._last_s)
        return {name: story for name, story in self._stories.items() if story.spans}

    def _end(self, story: Story, at_s: float) -> None:
        if story.request_id in self._open:
            event, activity = self._open[story.request_id]
            level, reason, blocks = event["level"], event["reason"], event["blocks"]
            start_s = event["at_s"]
            story.spans.append(Span(activity, level, reason, blocks, event["step"], start_s, at_s))

    def _activity(self, story: Story, event: dict[str, Any]) -> str:
        state: str = event["state"]
        if state != "running":
            return state
        if event.get("tokens"):
            again = story.first_token_s is not None or story.request_id in self._lost
            return "recompute" if again else "prefill"
        before = self._open.get(story.request_id)
        # A new level does not change what is computed.
        if event["reason"] != "prompt computed" and before and before[1] in RUNNING:
            return before[1]
        if story.first_token_s is None:
            story.first_token_s = event["at_s"]
        return "decode"
