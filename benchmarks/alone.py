"""What a request costs on an idle engine: the reference of slowdowns and of the latency target."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from benchmarks.metrics import tpot_s
from benchmarks.records import RequestRecord
from benchmarks.virtual_clock import DECODE_SECONDS, PREFILL_TOKEN_SECONDS, STEP_BASE_SECONDS
from benchmarks.workload import Request

# Requests are sent one at a time to learn what one costs: short and long prompts in turn.
SHORT_PROMPT, LONG_PROMPT = 32, 1024
_PAIRS, _OUTPUT_TOKENS = 4, 64
# Beyond any number that a workload uses.
_FIRST_ID = 990_000


@dataclass(frozen=True)
class Alone:
    """Seconds of a request that has the engine to itself; calling it gives its latency."""

    first_s: float
    prompt_token_s: float
    token_s: float

    def __call__(self, prompt_tokens: int, output_tokens: int) -> float:
        """End-to-end latency: the first step with its prompt, then one step a token."""
        prefill_s = self.first_s + prompt_tokens * self.prompt_token_s
        return prefill_s + (output_tokens - 1) * self.token_s

    def document(self) -> dict[str, float]:
        """In milliseconds, as it is written."""
        return {name.replace("_s", "_ms"): 1000 * value for name, value in asdict(self).items()}

    @classmethod
    def parse(cls, document: dict[str, float]) -> Alone:
        """Read what `document` wrote."""
        return cls(**{name.replace("_ms", "_s"): v / 1000 for name, v in document.items()})


# The virtual clock's own model.
VIRTUAL = Alone(STEP_BASE_SECONDS, PREFILL_TOKEN_SECONDS, STEP_BASE_SECONDS + DECODE_SECONDS)


def alone_requests() -> list[Request]:
    """Requests to send one at a time."""
    lengths = [SHORT_PROMPT, LONG_PROMPT] * _PAIRS
    return [
        Request(str(_FIRST_ID + number), 0.0, prompt, _OUTPUT_TOKENS)
        for number, prompt in enumerate(lengths)
    ]


def measured(records: Sequence[RequestRecord]) -> Alone:
    """From the records of `alone_requests`, sent one at a time.

    The shortest times to first token count: nothing makes one too short.
    """
    short_s = min(r.ttft_s for r in records if r.prompt_tokens == SHORT_PROMPT)
    long_s = min(r.ttft_s for r in records if r.prompt_tokens == LONG_PROMPT)
    prompt_token_s = max((long_s - short_s) / (LONG_PROMPT - SHORT_PROMPT), 0.0)
    return Alone(
        first_s=short_s - SHORT_PROMPT * prompt_token_s,
        prompt_token_s=prompt_token_s,
        token_s=statistics.median(tpot_s(record) for record in records),
    )
