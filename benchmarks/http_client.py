"""`vllm bench serve` as a subprocess, and its detailed result as request records."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.http_dataset import CLIENT_ENVIRONMENT, dataset_flags
from benchmarks.http_server import SERVED_NAME, Server, environment, vllm_command
from benchmarks.records import RequestRecord, digest_of_text
from benchmarks.workload import Request

# What the client reports request by request, the pilot first.
_BY_REQUEST = (
    *("errors", "input_lens", "output_lens"),
    *("start_times", "ttfts", "itls", "generated_texts"),
)


@dataclass(frozen=True)
class Sent:
    """What came back, and for each request how late the client sent it."""

    records: list[RequestRecord]
    late_s: list[float]


def bench_serve(
    server: Server,
    dataset: Path,
    requests: Sequence[Request],
    *,
    connections: int,
    one_by_one: bool = False,
) -> Sent:
    """Send a dataset written from `requests` and return what came back, in the same order.

    Latencies count from when a request was due, so that a client that is late, as on a busy
    machine, does not hide what its users would feel; `late_s` of the result says how late it was.
    Before anything counts, the client opens its first `connections` with warm-up requests. With
    `one_by_one` a request waits for the one before; latencies then count from when it was sent.

    Raises RuntimeError when the client fails, or when any request failed or came back with other
    token counts than the workload's.
    """
    result = dataset.with_suffix(".result.json")
    command = [vllm_command(), "bench", "serve", *dataset_flags(dataset, len(requests))]
    command += [*_flags(server, result), "--num-warmups", str(connections)]
    if one_by_one:
        command += ["--max-concurrency", "1"]
    done = subprocess.run(
        command,
        env=environment() | CLIENT_ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"vllm bench serve failed:\n{done.stdout[-4000:]}")
    detailed = json.loads(result.read_text(encoding="utf-8"))
    return sent_of(detailed, requests, from_due=not one_by_one)


def _flags(server: Server, result: Path) -> list[str]:
    return [
        *("--backend", "openai", "--endpoint", "/v1/completions"),
        *("--base-url", server.base_url, "--model", SERVED_NAME),
        *("--tokenizer", str(server.model), "--disable-tqdm"),
        *("--ignore-eos", "--temperature", "0", "--ready-check-timeout-sec", "0"),
        *("--save-result", "--save-detailed"),
        *("--result-dir", str(result.parent), "--result-filename", result.name),
    ]


def sent_of(result: dict[str, Any], requests: Sequence[Request], from_due: bool) -> Sent:
    """Turn a detailed result into records, checking it against the workload.

    The pilot, which comes first, is left out. `from_due` counts latencies from when requests were
    due instead of when they were sent.
    """
    result = {key: value[1:] if key in _BY_REQUEST else value for key, value in result.items()}
    if any(result["errors"]) or result["failed"]:
        first = next((error for error in result["errors"] if error), "unknown")
        raise RuntimeError(f"{result['failed']} requests failed, the first with: {first}")
    _check_lengths("prompt", result["input_lens"], [r.prompt_tokens for r in requests])
    _check_lengths("output", result["output_lens"], [r.output_tokens for r in requests])
    sent_s: list[float] = result["start_times"]
    # Nothing is sent before it is due, so the least late request tells when the run began.
    began_s = min(s - r.arrival_s for s, r in zip(sent_s, requests, strict=True))
    due_s = [began_s + request.arrival_s for request in requests]
    return Sent(
        [
            _record(result, index, request, due_s[index] if from_due else sent_s[index])
            for index, request in enumerate(requests)
        ],
        [s - d for s, d in zip(sent_s, due_s, strict=True)],
    )


def _check_lengths(what: str, got: Sequence[int], wanted: Sequence[int]) -> None:
    if list(got) != list(wanted):
        wrong = sum(a != b for a, b in itertools.zip_longest(got, wanted))
        raise RuntimeError(f"{wrong} requests have another {what} length than the workload")


def _record(
    result: dict[str, Any], index: int, request: Request, arrival_s: float
) -> RequestRecord:
    gaps = [result["start_times"][index] + result["ttfts"][index], *result["itls"][index]]
    return RequestRecord(
        request.id,
        arrival_s,
        request.prompt_tokens,
        request.output_tokens,
        tuple(itertools.accumulate(gaps)),
        digest_of_text(result["generated_texts"][index]),
    )
