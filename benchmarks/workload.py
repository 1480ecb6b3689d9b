"""What is served: requests as in `fastserve_vllm.traces`, and the prompts that they come with."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from fastserve_vllm.traces import (
    Request,
    Stream,
    TraceRow,
    all_present,
    built_in,
    gamma_arrivals_s,
    load_trace,
    paper_filter,
    rng,
    sample_requests,
    sample_window,
    scaled,
    scaled_to_rate,
    with_arrivals,
)

__all__ = [
    "Request",
    "TraceRow",
    "all_present",
    "built_in",
    "gamma_arrivals_s",
    "load_trace",
    "paper_filter",
    "prompt_token_ids",
    "sample_requests",
    "sample_window",
    "scaled",
    "scaled_to_rate",
    "with_arrivals",
]


def prompt_token_ids(
    request: Request, seed: int, vocab_size: int, special_ids: Collection[int]
) -> list[int]:
    """Seeded random token ids for a request's prompt, none of them special."""
    usable = np.setdiff1d(np.arange(vocab_size), np.fromiter(special_ids, dtype=np.int64))
    generator = rng(seed, Stream.PROMPT, int(request.id))
    return [int(token) for token in generator.choice(usable, size=request.prompt_tokens)]
