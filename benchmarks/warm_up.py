"""Requests that let an engine meet every kind of step before anything is measured."""

from __future__ import annotations

import math

from benchmarks.workload import Request

# Prompts that fill steps of every size, and enough of them for several batches.
_WARM_PROMPTS = (1024, 256, 64, 16)
_WARM_OUTPUTS = (64, 48, 24, 8)
_WARM_BATCHES = 4
_FIRST_WARM_ID = 900_000


def warm_up_requests(batch: int) -> list[Request]:
    """Several batches of requests with prompts and answers of mixed lengths, all at once."""
    count = _WARM_BATCHES * batch
    prompts = (_WARM_PROMPTS * math.ceil(count / len(_WARM_PROMPTS)))[:count]
    return [
        Request(
            str(_FIRST_WARM_ID + number),
            0.0,
            prompt + number % 7,
            _WARM_OUTPUTS[number // len(_WARM_PROMPTS) % len(_WARM_OUTPUTS)],
        )
        for number, prompt in enumerate(prompts)
    ]
