"""Datasets for `vllm bench serve`: the trace's lengths and the workload's arrivals, exactly.

The client's `timed_trace` type is used. It is the one that keeps an arrival, a prompt length and
an output length per request, and that sends token ids, which no tokenizer can lengthen.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.workload import Request

# The client makes up the tokens of a prompt from hashes, one per chunk of this many tokens; with
# a chunk longer than any prompt, each prompt is made from one.
CHUNK_TOKENS = 1 << 20
# The client derives those tokens from the hash of a string, which Python salts per process.
CLIENT_ENVIRONMENT = {"PYTHONHASHSEED": "0"}


# The client warms its connections up with copies of the first request. So that no measured request
# finds its prompt in the prefix cache, a pilot comes first, and is over when the others begin.
PILOT = Request("pilot", 0.0, 16, 32)
PILOT_SECONDS = 1.0


def write_dataset(path: Path, requests: Sequence[Request], prompts: str) -> None:
    """Write the pilot and the requests as JSON lines; each `prompts` name has its own prompts."""
    delayed = [replace(r, arrival_s=r.arrival_s + PILOT_SECONDS) for r in requests]
    rows = [_row(request, prompts) for request in (PILOT, *delayed)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def _row(request: Request, prompts: str) -> dict[str, object]:
    return {
        "timestamp": request.arrival_s,
        "input_length": request.prompt_tokens,
        "output_length": request.output_tokens,
        "hash_ids": [f"{prompts}-{request.id}"],
    }


def dataset_flags(path: Path, count: int) -> list[str]:
    """Flags of `vllm bench serve` that send a dataset of `count` requests at its own times."""
    return [
        *("--dataset-name", "timed_trace", "--dataset-path", str(path), "--self-timed"),
        *("--num-prompts", str(1 + count), "--timed-trace-chunk-hash-size", str(CHUNK_TOKENS)),
    ]
