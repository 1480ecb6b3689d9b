from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.errors import InputError
from benchmarks.http_dataset import PILOT_SECONDS, write_dataset
from benchmarks.workload import (
    Request,
    TraceRow,
    gamma_arrivals_s,
    load_trace,
    paper_filter,
    prompt_token_ids,
    sample_requests,
    sample_window,
    scaled_to_rate,
)

ROWS = [TraceRow(prompt_tokens=10 + n, output_tokens=5 + n, arrival_s=2.0 * n) for n in range(50)]


def trace(folder: Path, text: str) -> Path:
    path = folder / "trace.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_plain_columns(tmp_path):
    """A CSV of lengths alone has no arrivals."""
    path = trace(tmp_path, "prompt_tokens,output_tokens\n18,85\n23,11\n")
    assert load_trace(path) == [TraceRow(18, 85), TraceRow(23, 11)]


def test_timestamps_become_seconds(tmp_path):
    """Dates with seven decimals are read; only their differences matter."""
    path = trace(
        tmp_path,
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n",
    )
    first, second = load_trace(path)
    assert second.arrival_s - first.arrival_s == pytest.approx(4.314579, abs=1e-6)


def test_meaningless_timestamps_are_no_arrivals(tmp_path):
    """A placeholder where a date belongs means that the trace has no arrivals."""
    path = trace(tmp_path, 'TIMESTAMP,ContextTokens,GeneratedTokens\n"XXX",42,285\n')
    assert load_trace(path) == [TraceRow(42, 285)]


def test_arrival_column(tmp_path):
    """`arrival_s` is read as seconds."""
    path = trace(tmp_path, "arrival_s,prompt_tokens,output_tokens\n1.5,8,9\n")
    assert load_trace(path) == [TraceRow(8, 9, 1.5)]


def test_unservable_rows_are_dropped(tmp_path):
    """A request without prompt or output cannot be served."""
    path = trace(tmp_path, "prompt_tokens,output_tokens\n0,5\n5,0\n5,5\n")
    assert load_trace(path) == [TraceRow(5, 5)]


def test_missing_column_is_named(tmp_path):
    """The message says which column is missing."""
    with pytest.raises(ValueError, match="output_tokens, GeneratedTokens"):
        load_trace(trace(tmp_path, "prompt_tokens\n5\n"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("x,5", r"trace.csv, line 3: prompt_tokens must be a whole number of tokens, got 'x'"),
        ("5,", "line 3: output_tokens must be"),
        ("5", "line 3: output_tokens must be"),
        ("5,-1", "line 3: output_tokens must be"),
        ("5,1.5", "line 3: output_tokens must be"),
        ("5,1,7", "line 3: 1 more fields than the first line has columns"),
    ],
)
def test_malformed_row_is_named(tmp_path, row, message):
    """The message names file, line, column and value."""
    with pytest.raises(InputError, match=message):
        load_trace(trace(tmp_path, f"prompt_tokens,output_tokens\n5,5\n{row}\n"))


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b"prompt_tokens,output_tokens\n5,5\n\xff,5\n"]
)
def test_what_is_no_text_is_named(tmp_path, content):
    """A binary file is bad input, not a crash."""
    path = tmp_path / "trace.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"trace.csv, line \d: 'utf-8' codec"):
        load_trace(path)


@pytest.mark.parametrize("arrival", ["soon", "nan", "inf", ""])
def test_malformed_arrival_is_named(tmp_path, arrival):
    """An arrival is a finite number of seconds."""
    text = f"arrival_s,prompt_tokens,output_tokens\n{arrival},5,5\n"
    with pytest.raises(InputError, match="line 2: arrival_s must be a number of seconds"):
        load_trace(trace(tmp_path, text))


def test_missing_trace_is_named(tmp_path):
    """A trace that is not there is bad input, not a crash."""
    with pytest.raises(InputError, match="no trace at"):
        load_trace(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("prompt", "output", "kept"),
    [
        (1024, 1024, True),
        (1025, 4, False),
        (1024, 1025, False),
        (3, 3, False),
        (3, 4, True),
        (4, 3, True),
    ],
)
def test_paper_filter(prompt, output, kept):
    """Long requests go; tiny ones go only when both sides are tiny."""
    assert bool(paper_filter([TraceRow(prompt, output)])) is kept


def test_samples_follow_the_seed():
    """The same seed draws the same rows, another one draws others, none twice."""
    sample = sample_requests(ROWS, 20, seed=1)
    assert sample == sample_requests(ROWS, 20, seed=1)
    assert sample != sample_requests(ROWS, 20, seed=2)
    assert len({request.prompt_tokens for request in sample}) == 20


def test_ids_sort_in_order_of_the_sample():
    """As strings, ids order as the requests do."""
    ids = [request.id for request in sample_requests(ROWS, 50, seed=0)]
    assert ids == sorted(ids)


def test_too_large_a_sample_is_refused():
    """A sample never repeats rows."""
    with pytest.raises(ValueError, match="51"):
        sample_requests(ROWS, 51, seed=0)


def test_window_keeps_the_traces_gaps():
    """Consecutive rows arrive as they did, from 0."""
    window = sample_window(ROWS, 5, seed=3)
    assert [request.arrival_s for request in window] == [0.0, 2.0, 4.0, 6.0, 8.0]


def test_scaling_sets_the_rate():
    """5 requests at 10 per second take half a second."""
    assert scaled_to_rate(sample_window(ROWS, 5, seed=3), 10.0)[-1].arrival_s == pytest.approx(0.5)


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_variation(cv):
    """The last of n requests arrives at n / rate; the gaps vary as asked."""
    times = gamma_arrivals_s(20_000, rate_rps=8.0, cv=cv, seed=0)
    gaps = np.diff(times, prepend=0.0)
    assert times[-1] == pytest.approx(20_000 / 8.0)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)
    assert (gaps >= 0).all()


def test_arrivals_follow_the_seed():
    """The same seed gives the same arrivals."""
    assert gamma_arrivals_s(9, 1.0, 1.0, seed=4) == gamma_arrivals_s(9, 1.0, 1.0, seed=4)
    assert gamma_arrivals_s(9, 1.0, 1.0, seed=4) != gamma_arrivals_s(9, 1.0, 1.0, seed=5)


def test_prompts_avoid_special_tokens():
    """A prompt has its exact length and no special token, and depends on seed and request."""
    request = Request("000007", 0.0, 500, 1)
    ids = prompt_token_ids(request, 0, vocab_size=8, special_ids=(0, 3))
    assert len(ids) == 500
    assert set(ids) == {1, 2, 4, 5, 6, 7}
    assert ids == prompt_token_ids(request, 0, 8, (0, 3))
    assert ids != prompt_token_ids(request, 1, 8, (0, 3))
    assert ids != prompt_token_ids(Request("000008", 0.0, 500, 1), 0, 8, (0, 3))


def test_dataset_keeps_lengths_and_arrivals(tmp_path):
    """After the pilot, every request becomes one line, in order, with a prompt of its own."""
    path = tmp_path / "dataset.jsonl"
    write_dataset(path, [Request("a", 0.5, 9, 247), Request("b", 1.5, 47, 32)], prompts="load")
    pilot, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert pilot["timestamp"] == 0.0
    assert [row["timestamp"] for row in rows] == [0.5 + PILOT_SECONDS, 1.5 + PILOT_SECONDS]
    assert [(row["input_length"], row["output_length"]) for row in rows] == [(9, 247), (47, 32)]
    assert len({str(row["hash_ids"]) for row in (pilot, *rows)}) == 3
