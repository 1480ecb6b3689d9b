"""Request lengths as real users produce them, without anybody's data: fitted distributions.

A workload is a distribution of prompt lengths, one of output lengths, and how they go together.
Each distribution is a line through a few knots: the logarithm of the tokens over the standard
score (a log-normal one would be a straight line). The two scores of a request are normal with a
correlation. `benchmarks.fit_workload` makes the numbers below and states their error.

Standard library only, so that a simulation needs nothing else.
"""

import math
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

# Requests that are not sent, as in the paper's artefact: too long to serve, or too short to matter.
MAX_PROMPT_TOKENS = 1024
MAX_TOTAL_TOKENS = 2048
MIN_TOKENS = 4

# Shares of the requests that are no longer than the knots of a distribution.
KNOT_SHARES = (0.0005, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97, 0.99, 0.9995)
_KNOT_SCORES = tuple(NormalDist().inv_cdf(share) for share in KNOT_SHARES)


def is_served(prompt_tokens: int, output_tokens: int) -> bool:
    """The filter of the paper's artefact."""
    too_long = prompt_tokens > MAX_PROMPT_TOKENS or prompt_tokens + output_tokens > MAX_TOTAL_TOKENS
    too_short = prompt_tokens < MIN_TOKENS and output_tokens < MIN_TOKENS
    return not (too_long or too_short)


@dataclass(frozen=True)
class Workload:
    """Lengths of requests.

    Attributes:
        prompt_knots: tokens of the prompt that `KNOT_SHARES` of the requests do not exceed.
        output_knots: the same of the output.
        correlation: of the two standard scores of a request.
    """

    prompt_knots: tuple[float, ...]
    output_knots: tuple[float, ...]
    correlation: float

    def __post_init__(self) -> None:
        for knots in (self.prompt_knots, self.output_knots):
            if len(knots) != len(KNOT_SHARES) or min(knots) <= 0:
                raise ValueError(f"{len(KNOT_SHARES)} knots above 0 are needed, got {knots}")
            if any(low > high for low, high in pairwise(knots)):
                raise ValueError(f"knots must not decrease, got {knots}")
        if not -1 < self.correlation < 1:
            raise ValueError(f"a correlation lies between -1 and 1, got {self.correlation}")

    def lengths(self, seed: int) -> Iterator[tuple[int, int]]:
        """Endless (prompt tokens, output tokens); the same seed gives the same ones."""
        # Seeded by text, which Python hashes in the same way everywhere.
        normal = random.Random(f"lengths {seed}").gauss  # noqa: S311 - no secret
        prompt_logs = tuple(math.log(tokens) for tokens in self.prompt_knots)
        output_logs = tuple(math.log(tokens) for tokens in self.output_knots)
        own_share = math.sqrt(1 - self.correlation**2)
        while True:
            prompt_score = normal(0.0, 1.0)
            output_score = self.correlation * prompt_score + own_share * normal(0.0, 1.0)
            prompt = _tokens(prompt_logs, prompt_score)
            output = _tokens(output_logs, output_score)
            if is_served(prompt, output):
                yield prompt, output


def _tokens(logs: Sequence[float], score: float) -> int:
    """Tokens at a standard score: between two knots; beyond the outermost ones, those."""
    above = min(max(bisect_right(_KNOT_SCORES, score), 1), len(logs) - 1)
    low, high = _KNOT_SCORES[above - 1], _KNOT_SCORES[above]
    share = min(max((score - low) / (high - low), 0.0), 1.0)
    return max(round(math.exp(logs[above - 1] + share * (logs[above] - logs[above - 1]))), 1)


# Fitted to the lengths of ShareGPT and Alpaca requests that pass the filter.
WORKLOADS = {
    "sharegpt": Workload(
        prompt_knots=(
            *(1.5, 2.119, 4.349, 8.707, 12.56, 19.17, 30.24),
            *(56.36, 135.8, 337.4, 707.2, 901.5, 1016.0),
        ),
        output_knots=(
            *(2.02, 5.683, 10.4, 40.83, 103.4, 195.9, 281.6),
            *(368.4, 494.3, 668.0, 904.9, 984.5, 1145.0),
        ),
        correlation=0.192,
    ),
    "alpaca": Workload(
        prompt_knots=(
            *(4.811, 6.642, 7.774, 9.531, 11.02, 12.98, 15.11),
            *(18.14, 23.18, 29.76, 47.83, 70.88, 142.6),
        ),
        output_knots=(
            *(1.494, 2.052, 3.252, 7.414, 11.82, 20.98, 43.2),
            *(69.22, 96.67, 126.6, 192.3, 274.3, 578.1),
        ),
        correlation=-0.247,
    ),
}
