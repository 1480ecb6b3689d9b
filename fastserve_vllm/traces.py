"""Requests to serve: lengths from a CSV trace or built in, the paper's filter, samples, arrivals.

Everything random takes a seed and draws from its own stream, so another arrival process never
changes which requests are sampled.
"""

import csv
import enum
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fastserve_vllm.workloads import WORKLOADS, is_served

_PROMPT_COLUMNS = ("prompt_tokens", "ContextTokens")
_OUTPUT_COLUMNS = ("output_tokens", "GeneratedTokens")
# Rows of a built-in workload, from which samples are drawn as from a trace's.
BUILT_IN_ROWS = 50_000
_CHUNK = 10_000


class InputError(ValueError):
    """Input that cannot be used; the message says where it is and what was expected."""


class Stream(enum.IntEnum):
    """Independent random streams under one seed."""

    SAMPLE = 0
    ARRIVALS = 1
    PROMPT = 2


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One row of a trace; `arrival_s` is None where the trace carries no arrivals.

    `prefix` names what the first `prefix_tokens` of the prompt are; empty: nothing shared.
    """

    prompt_tokens: int
    output_tokens: int
    arrival_s: float | None = None
    prefix: str = ""
    prefix_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a workload. `arrival_s` counts from the start of the run.

    Requests with the same `prefix` have the same first `prefix_tokens`.
    """

    id: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prefix: str = ""
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            raise ValueError(
                f"request {self.id}: prompt_tokens and output_tokens must be at least 1, "
                f"got {self.prompt_tokens} and {self.output_tokens}"
            )


def load_trace(path: Path) -> list[TraceRow]:
    """Read a length trace; rows without a prompt or without output cannot be served and go.

    Raises InputError when a length column is missing, a row is malformed (naming file and line)
    or no row is left.
    """
    if not path.is_file():
        raise InputError(f"no trace at {path}")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            columns = reader.fieldnames or []
            prompt = _column(path, columns, _PROMPT_COLUMNS)
            output = _column(path, columns, _OUTPUT_COLUMNS)
            if "prefix" in columns:
                _column(path, columns, ("prefix_tokens",))
            rows = [_trace_row(row, prompt, output) for row in reader]
        except InputError:
            raise
        except (ValueError, csv.Error) as error:
            raise InputError(f"{path.name}, line {max(reader.line_num, 1)}: {error}") from None
    rows = [row for row in rows if row.prompt_tokens >= 1 and row.output_tokens >= 1]
    if not rows:
        raise InputError(f"{path.name} holds no request")
    return rows


def paper_filter(rows: Sequence[TraceRow]) -> list[TraceRow]:
    """Apply the filter of the paper's artefact: short enough to serve, long enough to matter."""
    return [row for row in rows if is_served(row.prompt_tokens, row.output_tokens)]


def built_in(name: str) -> list[TraceRow]:
    """Rows of a built-in workload, the same ones each time; they carry no arrivals."""
    lengths = islice(WORKLOADS[name].lengths(seed=0), BUILT_IN_ROWS)
    return [TraceRow(prompt, output) for prompt, output in lengths]


def scaled(rows: Sequence[TraceRow], prompts: float, outputs: float) -> list[TraceRow]:
    """Rows with lengths multiplied, one token at least."""
    if prompts == outputs == 1:
        return list(rows)
    return [
        replace(
            row,
            prompt_tokens=max(round(prompts * row.prompt_tokens), 1),
            output_tokens=max(round(outputs * row.output_tokens), 1),
        )
        for row in rows
    ]


def sample_requests(rows: Sequence[TraceRow], count: int, seed: int) -> list[Request]:
    """Draw `count` rows without replacement; every request is present at the start."""
    _check_count(rows, count)
    picked = rng(seed, Stream.SAMPLE).choice(len(rows), size=count, replace=False)
    return [_request(number, rows[row], 0.0) for number, row in enumerate(picked)]


def sample_window(rows: Sequence[TraceRow], count: int, seed: int) -> list[Request]:
    """Take `count` consecutive rows with the trace's own arrivals, the first one at 0.

    Raises InputError when the trace has no arrivals.
    """
    _check_count(rows, count)
    if any(row.arrival_s is None for row in rows):
        raise InputError("the trace carries no arrivals")
    first = int(rng(seed, Stream.SAMPLE).integers(0, len(rows) - count + 1))
    window = sorted(rows[first : first + count], key=_known_arrival_s)
    start_s = _known_arrival_s(window[0])
    return [_request(n, row, _known_arrival_s(row) - start_s) for n, row in enumerate(window)]


def gamma_arrivals_s(count: int, rate_rps: float, cv: float, seed: int) -> list[float]:
    """Arrival times with Gamma gaps of coefficient of variation `cv`; 1 is a Poisson process.

    The gaps are scaled so that `count` of them last exactly `count / rate_rps` seconds, as
    `vllm bench serve` does it: the offered load is then the same for every seed.
    """
    if count < 1 or rate_rps <= 0 or cv <= 0:
        raise ValueError(f"need count, rate, cv > 0, got {count}, {rate_rps}, {cv}")
    gaps = rng(seed, Stream.ARRIVALS).gamma(shape=cv**-2, scale=cv**2, size=count)
    times = np.cumsum(gaps)
    return [float(t) for t in times * (count / rate_rps / times[-1])]


def with_arrivals(requests: Sequence[Request], arrivals_s: Sequence[float]) -> list[Request]:
    """Give each request its arrival time, in order."""
    pairs = zip(requests, arrivals_s, strict=True)
    return [replace(request, arrival_s=arrival_s) for request, arrival_s in pairs]


def all_present(requests: Sequence[Request]) -> list[Request]:
    """Let every request arrive at the start."""
    return with_arrivals(requests, [0.0] * len(requests))


def scaled_to_rate(requests: Sequence[Request], rate_rps: float) -> list[Request]:
    """Stretch or squeeze the requests' own arrivals to a mean rate."""
    span_s = requests[-1].arrival_s
    if span_s <= 0 or rate_rps <= 0:
        raise ValueError("need requests that arrive over time and a positive rate")
    factor = len(requests) / rate_rps / span_s
    return with_arrivals(requests, [request.arrival_s * factor for request in requests])


def stream_requests(
    rows: Sequence[TraceRow], count: int, rate_rps: float, cv: float, seed: int
) -> Iterator[Request]:
    """Draw `count` rows with replacement, at a mean rate, one by one: nothing is kept.

    Args:
        rows: lengths to draw from.
        count: how many requests.
        rate_rps: arrivals a second.
        cv: coefficient of variation of the Gamma gaps; 1 is a Poisson process.
        seed: of lengths and of gaps.
    """
    if count < 1 or rate_rps <= 0 or cv <= 0:
        raise ValueError(f"need count, rate, cv > 0, got {count}, {rate_rps}, {cv}")
    lengths, gaps = rng(seed, Stream.SAMPLE), rng(seed, Stream.ARRIVALS)
    now_s = 0.0
    for first in range(0, count, _CHUNK):
        size = min(_CHUNK, count - first)
        picked = lengths.integers(0, len(rows), size=size)
        times = now_s + np.cumsum(gaps.gamma(shape=cv**-2, scale=cv**2 / rate_rps, size=size))
        now_s = float(times[-1])
        for number in range(size):
            yield _request(first + number, rows[picked[number]], float(times[number]))


def _request(number: int, row: TraceRow, arrival_s: float) -> Request:
    # Zero-padded, so that the order of the ids as strings is the order of arrival.
    return Request(
        f"{number:06d}",
        arrival_s,
        row.prompt_tokens,
        row.output_tokens,
        row.prefix,
        row.prefix_tokens,
    )


def rng(seed: int, *stream: int) -> np.random.Generator:
    """The generator of a stream under a seed."""
    return np.random.default_rng([seed, *(int(part) for part in stream)])


def _check_count(rows: Sequence[TraceRow], count: int) -> None:
    if not 1 <= count <= len(rows):
        raise InputError(f"cannot take {count} requests from {len(rows)} rows")


def _known_arrival_s(row: TraceRow) -> float:
    if row.arrival_s is None:
        raise ValueError("the row carries no arrival")
    return row.arrival_s


def _column(path: Path, columns: Collection[str], names: Sequence[str]) -> str:
    for name in names:
        if name in columns:
            return name
    raise InputError(
        f"{path.name} needs one of the columns {', '.join(names)}; it has {', '.join(columns)}"
    )


def _trace_row(row: Mapping[str | None, Any], prompt: str, output: str) -> TraceRow:
    if None in row:
        raise ValueError(f"{len(row[None])} more fields than the first line has columns")
    prompt_tokens = _tokens(row, prompt)
    prefix = row.get("prefix") or ""
    shared = min(_tokens(row, "prefix_tokens"), prompt_tokens) if prefix else 0
    return TraceRow(prompt_tokens, _tokens(row, output), _arrival_s(row), prefix, shared)


def _tokens(row: Mapping[str | None, Any], column: str) -> int:
    text = row[column]
    try:
        count = int(text or "")
    except ValueError:
        count = -1
    if count < 0:
        raise ValueError(f"{column} must be a whole number of tokens, got {text!r}")
    return count


def _arrival_s(row: Mapping[str | None, Any]) -> float | None:
    """Seconds from `arrival_s`, or from `TIMESTAMP`, where anything but a date means none."""
    if "arrival_s" in row:
        return _seconds(row["arrival_s"])
    try:
        moment = datetime.fromisoformat(row.get("TIMESTAMP") or "")
    except ValueError:
        return None
    # Only differences matter; a fixed zone keeps daylight saving out of them.
    return moment.replace(tzinfo=timezone.utc).timestamp()


def _seconds(text: str | None) -> float:
    try:
        seconds = float(text or "")
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise ValueError(f"arrival_s must be a number of seconds, got {text!r}")
    return seconds
