"""What one served request left behind: the input of every figure in `metrics`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One finished request. All times are seconds on the run's clock, virtual or wall.

    `token_times_s` holds one time per received chunk: one per token in process, and at most one
    per token over HTTP, where the server may put several tokens into a chunk.
    """

    id: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    token_times_s: tuple[float, ...]
    # sha256 of what was generated; the same digest from two systems means the same output.
    output_digest: str

    def __post_init__(self) -> None:
        if not self.token_times_s or self.output_tokens < 1:
            raise ValueError(f"request {self.id} has no output")

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.token_times_s[0] - self.arrival_s

    @property
    def e2e_s(self) -> float:
        """End-to-end latency: arrival to last token."""
        return self.token_times_s[-1] - self.arrival_s

    @property
    def normalized_s(self) -> float:
        """End-to-end latency per output token."""
        return self.e2e_s / self.output_tokens


def digest_of_tokens(token_ids: Sequence[int]) -> str:
    """Hash a token sequence."""
    return hashlib.sha256(",".join(map(str, token_ids)).encode()).hexdigest()


def digest_of_text(text: str) -> str:
    """Hash a generated text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def digest_of_run(records: Sequence[RequestRecord]) -> str:
    """Hash the outputs of a whole run, independent of the order in which requests finished."""
    ordered = sorted(records, key=lambda record: record.id)
    return digest_of_text("\n".join(f"{r.id} {r.output_digest}" for r in ordered))


def request_digests(records: Sequence[RequestRecord]) -> dict[str, str]:
    """Each request's own digest, shortened: 400 of them are in every result."""
    return {record.id: record.output_digest[:8] for record in records}
