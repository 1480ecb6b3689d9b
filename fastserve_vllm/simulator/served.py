"""What comes out of a simulation."""

from dataclasses import dataclass

from fastserve_vllm.traces import Request


@dataclass(frozen=True, slots=True)
class ServedRequest:
    """A finished request.

    Attributes:
        request: what was asked for.
        first_token_s, last_token_s: when those tokens came, seconds since the start.
        longest_gap_s: the longest time between two of its tokens; 0 for a single token.
    """

    request: Request
    first_token_s: float
    last_token_s: float
    longest_gap_s: float

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.first_token_s - self.request.arrival_s

    @property
    def e2e_s(self) -> float:
        """End-to-end latency."""
        return self.last_token_s - self.request.arrival_s

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first; there must be a second one."""
        return (self.last_token_s - self.first_token_s) / (self.request.output_tokens - 1)

    @property
    def normalized_s(self) -> float:
        """End-to-end latency per output token."""
        return self.e2e_s / self.request.output_tokens
