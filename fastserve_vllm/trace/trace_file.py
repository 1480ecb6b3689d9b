"""Writes a trace: JSON lines in a file of bounded size."""

import json
import logging
import os
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, NamedTuple

MAX_BYTES = 64 << 20
BACKUPS = 3
_PENDING = 512
_PERIOD_S = 0.5


class Event(NamedTuple):
    """A request changed its state or its level.

    Attributes:
        at_s: when, on the scheduler's clock.
        step: the number of the step that was being planned, or had been planned last.
        request_id: vLLM's own id: the one the client sees, and more.
        state: a `JobState`'s value, or `finished`.
        level: its queue level.
        reason: why.
        blocks: KV blocks it holds on the device.
        tokens: of one that starts: what it has to compute before its next token; 0 otherwise.
    """

    at_s: float
    step: int
    request_id: str
    state: str
    level: int
    reason: str
    blocks: int
    tokens: int = 0


class TraceFile:
    """Buffers events and writes them twice a second; a crash loses what is buffered.

    When `MAX_BYTES` are full, the file becomes FILE.1, that one FILE.2 and so on; the last of
    `BACKUPS` goes. Each file begins with a line that describes the run.

    Args:
        path: where to.
        about: of the run, for the reader: policy, batch limit and the like.
        max_bytes: size at which a new file begins.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: str, about: dict[str, Any], max_bytes: int = MAX_BYTES) -> None:
        header = {"trace": 1, "run": f"{time.time_ns()}-{os.getpid()}", **about}
        self._handler = _Handler(path, max_bytes, json.dumps(header))
        self._pending: list[Event] = []
        self._written_s = 0.0

    def add(self, event: Event, handle: Any = None) -> None:
        """Note an event."""
        self._pending.append(event)

    def step(self, now_s: float) -> None:
        """Write what is pending, if it is much or old."""
        if len(self._pending) >= _PENDING or now_s - self._written_s >= _PERIOD_S:
            self._written_s = now_s
            self.flush()

    def flush(self) -> None:
        """Write what is pending."""
        if self._pending:
            lines = "\n".join([_line(event) for event in self._pending])
            self._pending.clear()
            self._handler.handle(_record(lines))

    def close(self) -> None:
        """Write what is pending, and close the file."""
        self.flush()
        self._handler.close()


class _Handler(RotatingFileHandler):
    """Begins every file with the header."""

    def __init__(self, path: str, max_bytes: int, header: str) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._header = header
        super().__init__(path, maxBytes=max_bytes, backupCount=BACKUPS, encoding="utf-8")
        self.setFormatter(logging.Formatter("%(message)s"))
        self._begin()

    def doRollover(self) -> None:  # noqa: N802
        """As the library's."""
        super().doRollover()
        self._begin()

    def _begin(self) -> None:
        assert self.stream is not None
        self.stream.write(self._header + "\n")


def _record(message: str) -> logging.LogRecord:
    return logging.LogRecord("trace", logging.INFO, "", 0, message, None, None)


def _line(event: Event) -> str:
    """One line; the id alone may hold what JSON has to escape."""
    at_s, step, request_id, state, level, reason, blocks, tokens = event
    more = f',"tokens":{tokens}' if tokens else ""
    return (
        f'{{"at_s":{at_s:.6f},"step":{step},"id":{json.dumps(request_id)},"state":"{state}",'
        f'"level":{level},"reason":"{reason}","blocks":{blocks}{more}}}'
    )
