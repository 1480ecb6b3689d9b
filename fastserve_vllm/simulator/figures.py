"""The figures of a simulation, from requests that finish one by one: nothing is kept of them.

Durations come out in milliseconds, under the names that the benchmarks give them.
"""

import math
from typing import Any

from ddsketch import DDSketch

from fastserve_vllm.simulator.served import ServedRequest

PERCENTILES = (50, 95, 99)
# Percentiles are this close to the true ones, relative to them.
ACCURACY = 0.002


class Spread:
    """Mean, percentiles and maximum of a stream of durations."""

    def __init__(self) -> None:
        self._sketch = DDSketch(ACCURACY)
        self._sum_s = 0.0
        self._count = 0
        self._max_s = 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        """Take in a duration, or several alike."""
        self._sketch.add(seconds, times)
        self._sum_s += seconds * times
        self._count += times
        self._max_s = max(self._max_s, seconds)

    def figures_ms(self) -> dict[str, float] | None:
        """What is known; None without a single duration."""
        if not self._count:
            return None
        percentiles = {
            f"p{p}": 1000 * float(self._sketch.get_quantile_value(p / 100) or 0.0)
            for p in PERCENTILES
        }
        mean_ms = 1000 * self._sum_s / self._count
        return {"mean": mean_ms, **percentiles, "max": 1000 * self._max_s}


class Figures:
    """Takes in what an engine serves.

    Args:
        long_prompt_tokens: prompts of at least so many tokens have figures of their own, too.
    """

    def __init__(self, long_prompt_tokens: float = math.inf) -> None:
        self._long_prompt_tokens = long_prompt_tokens
        self._long_ttft = Spread()
        names = ("ttft_ms", "tpot_ms", "itl_ms", "longest_gap_ms", "e2e_ms", "normalized_ms")
        self._spreads = {name: Spread() for name in names}
        self._requests = self._prompt_tokens = self._output_tokens = 0
        self._first_s, self._last_s = math.inf, 0.0

    def gap(self, seconds: float, times: int) -> None:
        """Gaps between two tokens of a request, `times` of them alike."""
        self._spreads["itl_ms"].add(seconds, times)

    def take(self, served: ServedRequest) -> None:
        """A request has finished."""
        request, spreads = served.request, self._spreads
        self._requests += 1
        self._prompt_tokens += request.prompt_tokens
        self._output_tokens += request.output_tokens
        self._first_s = min(self._first_s, request.arrival_s)
        self._last_s = max(self._last_s, served.last_token_s)
        spreads["ttft_ms"].add(served.ttft_s)
        spreads["e2e_ms"].add(served.e2e_s)
        if request.prompt_tokens >= self._long_prompt_tokens:
            self._long_ttft.add(served.ttft_s)
        spreads["normalized_ms"].add(served.normalized_s)
        if request.output_tokens > 1:
            spreads["tpot_ms"].add(served.tpot_s)
            spreads["longest_gap_ms"].add(served.longest_gap_s)

    def document(self) -> dict[str, Any]:
        """All figures.

        Raises:
            ValueError: no request has finished.
        """
        if not self._requests:
            raise ValueError("a run without requests has no figures")
        duration_s = self._last_s - self._first_s
        return {
            "requests": self._requests,
            "prompt_tokens": self._prompt_tokens,
            "output_tokens": self._output_tokens,
            "duration_s": duration_s,
            "requests_per_s": self._requests / duration_s,
            "output_tokens_per_s": self._output_tokens / duration_s,
            "long_prompts_ttft_ms": self._long_ttft.figures_ms(),
            **{name: spread.figures_ms() for name, spread in self._spreads.items()},
        }
