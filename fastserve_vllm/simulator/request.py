"""What goes into a simulation, and what comes out of it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SimulatedRequest:
    """A request whose answer's length is known to the simulation, and never to the policy (I8).

    Attributes:
        request_id: unique.
        arrival_s: seconds since the start.
        prompt_tokens, output_tokens: at least 1 each.
        priority: vLLM's; smaller runs first.
    """

    request_id: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    priority: int = 0

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            raise ValueError(
                f"request {self.request_id}: prompt_tokens and output_tokens must be at least 1, "
                f"got {self.prompt_tokens} and {self.output_tokens}"
            )


@dataclass(frozen=True, slots=True)
class ServedRequest:
    """A finished request.

    Attributes:
        request: what was asked for.
        first_token_s, last_token_s: when those tokens came, seconds since the start.
        longest_gap_s: the longest time between two of its tokens; 0 for a single token.
    """

    request: SimulatedRequest
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
    def normalized_s(self) -> float:
        """End-to-end latency per output token."""
        return self.e2e_s / self.request.output_tokens
